"""Where a record stands: from its number over all files to ``file:line``. Reads the files when it is first asked."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from itertools import accumulate

from nemo_kto.data.readers import count_records, locate


class RecordPlaces:
    """Finds records by :attr:`~nemo_kto.data.store.TokenStore.record_index`.

    Args:
        files: the files the store was built from, in order. They are read once, and not as JSON: some seconds for
            some gigabytes.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._files = list(files)
        self._ends: list[int] = []
        self._blank: list[list[int]] = []

    def where(self, records: Iterable[int]) -> list[str]:
        """``file:line`` (``file:row N`` for parquet) of each record, numbered from 0 over all files.

        Where the files are gone, or are not what they were, a record has its number only: ``record N``, from 1.
        """
        try:
            self._read()
        except (OSError, EOFError, ValueError):
            return [f"record {record + 1}" for record in records]
        return [self._where(record) for record in records]

    def _read(self) -> None:
        if not self._ends:
            counted = [count_records(file) for file in self._files]
            self._blank = [blank for _, blank in counted]
            self._ends = list(accumulate(number for number, _ in counted))

    def _where(self, record: int) -> str:
        file = bisect.bisect_right(self._ends, record)
        if file == len(self._files):
            return f"record {record + 1}"
        line = record + 1 - (self._ends[file - 1] if file else 0)
        for blank in self._blank[file]:
            if blank > line:
                break
            line += 1
        return locate(self._files[file], line)
