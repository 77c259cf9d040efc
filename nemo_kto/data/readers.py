"""From files to raw values with their line numbers. Not for judging what a record means, and not for tokens."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from nemo_kto.data.problems import Problems

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
SUFFIXES = (*JSONL_SUFFIXES, ".parquet")
FIELDS = ("prompt", "response", "preference", "completion", "label")
"""Keys that a record may be made of. A parquet file's other columns are not even read."""

_PARQUET_BATCH = 1024  # rows that are Python objects at a time
_BOM = b"\xef\xbb\xbf"
_WANT_JSON = "want one JSON object per line"


def locate(path: str, number: int) -> str:
    """How a message names record ``number`` (from 1) of a file: ``file:line``, or ``file:row N`` for parquet."""
    return f"{path}:row {number}" if path.lower().endswith(".parquet") else f"{path}:{number}"


def usable_files(files: Sequence[str | Path], problems: Problems) -> list[str]:
    """The files that can be opened, in order; what is wrong with the others goes to ``problems``."""
    usable: list[str] = []
    seen: set[str] = set()
    for file in map(str, files):
        identity = os.path.realpath(file)
        complaint = "is listed twice; want every file once" if identity in seen else _complaint(file)
        seen.add(identity)
        if complaint:
            problems.add(file, complaint)
        else:
            usable.append(file)
    if not files:
        problems.add("data", "no file is given; want at least one .jsonl, .jsonl.gz or .parquet file")
    return usable


def _complaint(file: str) -> str | None:
    if not file.lower().endswith(SUFFIXES):
        return f"is of an unknown kind; want a name that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    if os.path.isdir(file):
        return "is a directory; want a file"
    if not os.path.exists(file):
        return f"does not exist (looked from {os.getcwd()}); want a file"
    if os.path.getsize(file) == 0:
        return "is empty; want at least one record"
    return None


def iter_values(file: str, problems: Problems) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, value) for every record of a file; what cannot be read goes to ``problems``.

    Blank lines of a JSONL file are skipped, but counted in the line numbers.
    """
    if file.lower().endswith(".parquet"):
        yield from _iter_parquet(file, problems)
    else:
        yield from _iter_jsonl(file, problems)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return result


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique)


def _iter_jsonl(file: str, problems: Problems) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with _open(file) as stream:
            for number, line in enumerate(stream, 1):
                if not _is_blank(line):
                    yield from _parse(file, number, line, problems)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problems.add(locate(file, number + 1), f"the gzip stream is corrupt ({error}); want a whole gzip file")
    except OSError as error:
        problems.add(file, f"cannot be read ({error.strerror}); want a readable file")


def _is_blank(line: bytes) -> bool:
    return line.strip() in (b"", _BOM)


def count_records(file: str) -> tuple[int, list[int]]:
    """How many records a file that has been read without a problem holds, and which of its lines (from 1) are blank.

    Raises:
        OSError: it cannot be read any more.
    """
    if file.lower().endswith(".parquet"):
        from pyarrow import parquet

        return int(parquet.read_metadata(file).num_rows), []
    lines, blank = 0, []
    with _open(file) as stream:
        for lines, line in enumerate(stream, 1):
            if _is_blank(line):
                blank.append(lines)
    return lines - len(blank), blank


def _open(file: str) -> BinaryIO:
    if file.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(file, "rb"))
    return open(file, "rb")


def _parse(file: str, number: int, line: bytes, problems: Problems) -> Iterator[tuple[int, Any]]:
    """Yield one value, or none and a problem."""
    try:
        value = _DECODER.decode(line.removeprefix(_BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        what = f"byte {error.start + 1} of the line is not valid UTF-8; want UTF-8 text"
    except json.JSONDecodeError as error:
        what = f"not JSON ({error.msg} at column {error.colno}); {_WANT_JSON}"
    except (ValueError, RecursionError) as error:  # NaN, doubled keys, integers beyond Python's digit limit, depth
        what = f"not JSON ({error}); {_WANT_JSON}"
    else:
        yield number, value
        return
    problems.add(locate(file, number), what)


def _iter_parquet(file: str, problems: Problems) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 1
    try:
        with parquet.ParquetFile(file) as table:
            columns = [name for name in table.schema_arrow.names if name in FIELDS]
            if not columns:
                problems.add(
                    file, f"has none of the columns {', '.join(FIELDS)}; want prompt, response and preference"
                )
                return
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH, columns=columns):
                yield from _rows(file, number, batch, problems)
                number += batch.num_rows
            if number == 1:
                problems.add(file, "holds no row; want at least one record")
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(locate(file, number), f"the parquet file is corrupt ({error}); want a whole parquet file")


def _rows(file: str, first: int, batch: Any, problems: Problems) -> Iterator[tuple[int, Any]]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = None
    if rows is not None:
        yield from enumerate(rows, first)
        return
    for i in range(batch.num_rows):
        try:
            row = batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError:
            problems.add(locate(file, first + i), "holds text that is not valid UTF-8; want UTF-8 text")
        else:
            yield first + i, row
