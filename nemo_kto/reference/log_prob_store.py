"""The cache of one reference's log-probs: all files of a folder to read, one of them to write. Scores nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_kto.reference import log_prob_file
from nemo_kto.reference.log_prob_file import ForeignFileError, RecordWriter, as_keys, make_records
from nemo_kto.reference.row_keys import RowKey
from nemo_kto.reference.sorted_runs import SortedRuns

ABOUT = "reference.json"
"""File of a folder that says what its log-probs are of; nothing reads it."""

logger = logging.getLogger(__name__)


class LogProbStore:
    """Log-probs by row. Any number of processes may use a folder at once; each writes a file of its own.

    Nothing that is wrong with the folder ends a run: files and records that cannot be used are left out, and where
    nothing can be written, nothing is. Either is said once.

    Args:
        folder: of this reference. Need not exist.
        identity: 32 bytes; files of another one are not used.
        about: says in the folder, for people, what it is of.
        speaks: whether to say what is wrong with files that all processes see.
    """

    def __init__(self, folder: Path, identity: bytes, *, about: str = "", speaks: bool = True) -> None:
        self.folder = folder
        self.failure: str | None = None
        """Why nothing is written any more; None while it is."""
        self.bytes_written = 0
        """Of records, by this process."""
        self._identity = identity
        self._about = about
        self._speaks = speaks
        self._entries = SortedRuns()
        self._writer = RecordWriter(folder, identity)
        self._read: dict[str, int] = {}
        self._said: set[str] = set()
        self._refresh()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, keys: Sequence[RowKey]) -> NDArray[np.float64]:
        """[n] float64 nats, NaN where a row is not known. Files are looked at again where one is not."""
        wanted = as_keys([key.key for key in keys])
        found = self._entries.get(wanted)
        if np.isnan(found).any():
            self._refresh()
            found = self._entries.get(wanted)
        return found

    def put(self, rows: Sequence[tuple[RowKey, float]]) -> None:
        """Keep log-probs, in memory and in this process's file. Numbers that are not finite are not kept."""
        kept = [(key, value) for key, value in rows if math.isfinite(value)]
        if not kept:
            return
        records = make_records(
            [key.key for key, _ in kept], [value for _, value in kept], [key.num_tokens for key, _ in kept]
        )
        self._entries.add(records["key"], records["logp"])
        if self.failure is None:
            try:
                self._writer.append(records)
                self.bytes_written += records.nbytes
                self._describe()
            except OSError as error:
                self._give_up(error)

    def flush(self) -> None:
        """Force what was written to the disk."""
        if self.failure is None:
            try:
                self._writer.flush()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Flush, and write no more."""
        self.flush()
        self._writer.close()

    def _describe(self) -> None:
        """Once, with a draft of its own: others may be doing it as well. Nothing depends on it."""
        about, self._about = self._about, ""
        if about and not (self.folder / ABOUT).exists():
            draft = self._writer.path.with_suffix(".draft")
            with suppress(OSError):
                draft.write_text(about, encoding="utf-8")
                draft.replace(self.folder / ABOUT)

    def _give_up(self, error: OSError) -> None:
        self.failure = f"{self.folder} cannot be written ({error.strerror or error})"
        self._writer.close()
        logger.error("%s: reference log-probs are not kept from here on. The run goes on", self.failure)

    def _refresh(self) -> None:
        """Read what the files of all others have more than the last time, in the order of their names."""
        try:
            paths = sorted(self.folder.glob(f"*{log_prob_file.SUFFIX}"))
        except OSError as error:
            self._say(self.folder, f"cannot be listed ({error.strerror or error})")
            return
        for path in paths:
            start = self._read.get(path.name, 0)
            if path == self._writer.path or start < 0:
                continue
            try:
                found = log_prob_file.read(path, self._identity, start)
            except ForeignFileError as error:
                self._read[path.name] = -1
                self._say(path, f"is not used: {error}")
                continue
            except OSError as error:
                self._say(path, f"cannot be read ({error.strerror or error}): what it holds is scored anew")
                continue
            self._read[path.name] = found.end
            self._entries.add(found.keys, found.logps)
            if found.damaged:
                self._say(path, f"has {found.damaged} damaged records: those are scored anew")

    def _say(self, path: Path, what: str) -> None:
        if self._speaks and path.name not in self._said:
            self._said.add(path.name)
            logger.warning("%s %s", path, what)
