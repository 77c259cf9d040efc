"""Tokenised rows on disk, memory-mapped: written once, read by every process. Not for deciding what a row holds."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nemo_kto.config.identity import FileDigests

IntArray = NDArray[np.int64]
_IDS, _MANIFEST = "ids", "store.json"
_ROW_ARRAYS = ("lengths", "prompt_lengths", "desirable", "record_index", "prompt_keys", "response_keys")
_ARRAYS = (_IDS, "offsets", *_ROW_ARRAYS[1:])
_BLOCK = 1 << 22  # bytes per read of a checksum


@dataclass(frozen=True)
class RowChunk:
    """B encoded rows on their way to a store, and what happened to the records that they came from.

    Attributes:
        ids: [sum of lengths] int32, the rows one after the other.
        lengths: [B] int64, prompt + response, in tokens.
        prompt_lengths: [B] int64, at least 1 and less than ``lengths``.
        desirable: [B] bool.
        record_index: [B] int64, position among all records, dropped ones included.
        prompt_keys: [B, 2] uint64, 128-bit hash of the prompt's own ids (those before a split at a merged token).
        response_keys: [B, 2] uint64, 128-bit hash of the response's ids.
        num_records: records looked at, B and the dropped ones.
        dropped_overlong: records left out because they exceed the sequence length.
        truncated: rows whose response was cut.
        boundary_merges: rows whose last prompt token changed when the response was appended.
        problems: (where, what) of records that cannot be encoded.
    """

    ids: NDArray[np.int32]
    lengths: IntArray
    prompt_lengths: IntArray
    desirable: NDArray[np.bool_]
    record_index: IntArray
    prompt_keys: NDArray[np.uint64]
    response_keys: NDArray[np.uint64]
    num_records: int
    dropped_overlong: int
    truncated: int
    boundary_merges: int
    problems: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class StoreSummary:
    """What a store holds and what was left out of it. ``num_tokens`` and ``longest_row`` are in tokens."""

    num_records: int
    num_rows: int
    dropped_overlong: int
    truncated: int
    boundary_merges: int
    num_desirable: int
    num_undesirable: int
    num_tokens: int
    longest_row: int
    files: tuple[str, ...]

    def describe(self) -> str:
        """One line for a log."""
        return (
            f"{self.num_rows} rows ({self.num_desirable} desirable, {self.num_undesirable} undesirable, "
            f"{self.num_tokens} tokens, longest {self.longest_row}) of {self.num_records} records; "
            f"{self.dropped_overlong} dropped as overlong, {self.truncated} truncated, "
            f"{self.boundary_merges} split at a token that spans prompt and response"
        )


class StoreWriter:
    """Writes a store into an existing empty directory, chunk by chunk, holding only the small columns in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks: list[RowChunk] = []
        self._num_ids = 0
        self._ids_file: BinaryIO = (path / f"{_IDS}.npy").open("wb")
        self._header_size = self._write_header()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ids_file.close()

    def _write_header(self) -> int:
        self._ids_file.seek(0)
        header = {"descr": "<i4", "fortran_order": False, "shape": (self._num_ids,)}
        np.lib.format.write_array_header_1_0(self._ids_file, header)
        return self._ids_file.tell()

    def add(self, chunk: RowChunk) -> None:
        """Append the rows of ``chunk``."""
        self._ids_file.write(chunk.ids.astype("<i4").tobytes())
        self._num_ids += chunk.ids.size
        self._chunks.append(replace(chunk, ids=chunk.ids[:0].copy()))  # the ids are on disk; keep the columns

    def finish(self, files: Sequence[str]) -> StoreSummary:
        """Write the columns and, last, the manifest that makes the store valid. At least one row must be there."""
        # numpy pads the header so that the first axis can grow: the second one covers exactly the first.
        assert self._write_header() == self._header_size
        self._ids_file.close()
        columns = {name: np.concatenate([getattr(c, name) for c in self._chunks]) for name in _ROW_ARRAYS}
        lengths = columns.pop("lengths")
        columns["offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        for name, column in columns.items():
            np.save(self._path / f"{name}.npy", column)
        summary = self._summary(lengths, columns["desirable"], files)
        (self._path / _MANIFEST).write_text(_manifest(self._path, asdict(summary)), encoding="utf-8")
        return summary

    def _summary(self, lengths: IntArray, desirable: NDArray[np.bool_], files: Sequence[str]) -> StoreSummary:
        num_desirable = int(desirable.sum())
        return StoreSummary(
            num_records=sum(c.num_records for c in self._chunks),
            num_rows=lengths.size,
            dropped_overlong=sum(c.dropped_overlong for c in self._chunks),
            truncated=sum(c.truncated for c in self._chunks),
            boundary_merges=sum(c.boundary_merges for c in self._chunks),
            num_desirable=num_desirable,
            num_undesirable=lengths.size - num_desirable,
            num_tokens=int(lengths.sum()),
            longest_row=int(lengths.max()),
            files=tuple(files),
        )


def _manifest(path: Path, summary: dict[str, Any]) -> str:
    """The summary, with the checksums of everything, itself included."""
    checksums = {name: _checksum(path / f"{name}.npy") for name in _ARRAYS}
    checksums["summary"] = zlib.crc32(json.dumps(summary).encode())
    return json.dumps({"summary": summary, "crc32": checksums}, indent=1)


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def is_intact(path: Path) -> bool:
    """Whether ``path`` holds a whole store, every byte as it was written. Reads all of it."""
    try:
        manifest = (path / _MANIFEST).read_text(encoding="utf-8")
        return manifest == _manifest(path, json.loads(manifest)["summary"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


class TokenStore:
    """Rows of token ids, read from disk as they are asked for. Pickles as its path, so workers share the page cache.

    Attributes:
        path: the directory.
        summary: counts over the whole store.
        desirable: [n] bool.
        prompt_lengths: [n] int64, tokens.
        record_index: [n] int64, position of each row's record among all records of the files, dropped ones included.
        prompt_keys: [n, 2] uint64, 128-bit hashes, equal where prompts are.
        response_keys: [n, 2] uint64, the same for responses.
        digests: of the files it was asked for; None in a copy that another process has opened by its path.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.digests: FileDigests | None = None
        summary: dict[str, Any] = json.loads((self.path / _MANIFEST).read_text(encoding="utf-8"))["summary"]
        self.summary = StoreSummary(**{**summary, "files": tuple(summary["files"])})
        self._ids: NDArray[np.int32] = self._load(_IDS)
        self._offsets: IntArray = self._load("offsets")
        self.prompt_lengths: IntArray = self._load("prompt_lengths")
        self.desirable: NDArray[np.bool_] = self._load("desirable")
        self.record_index: IntArray = self._load("record_index")
        self.prompt_keys: NDArray[np.uint64] = self._load("prompt_keys")
        self.response_keys: NDArray[np.uint64] = self._load("response_keys")

    def _load(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self.path / f"{name}.npy", mmap_mode="r")
        return array

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.path,)

    def __len__(self) -> int:
        return self.summary.num_rows

    def prompt(self, i: int) -> NDArray[np.int32]:
        """[P_i] int32: ids of the prompt of row i, at least one."""
        start = int(self._offsets[i])
        return self._ids[start : start + int(self.prompt_lengths[i])]

    def response(self, i: int) -> NDArray[np.int32]:
        """[R_i] int32: ids of the response of row i, at least one."""
        return self._ids[int(self._offsets[i]) + int(self.prompt_lengths[i]) : int(self._offsets[i + 1])]

    def lengths(self, indices: IntArray) -> IntArray:
        """[k] int64: tokens of prompt + response of the rows asked for."""
        lengths: IntArray = self._offsets[indices + 1] - self._offsets[indices]
        return lengths

    def first_beyond(self, vocab_size: int) -> tuple[int, int] | None:
        """(row, token id) of the first token that a vocabulary of so many ids does not have; None if it has all."""
        if int(self._ids.max()) < vocab_size:
            return None
        place = int(np.argmax(self._ids >= vocab_size))
        return int(np.searchsorted(self._offsets, place, side="right")) - 1, int(self._ids[place])

    def prompt_key(self, i: int) -> bytes:
        """16 bytes, equal for rows whose prompts are equal."""
        return bytes(self.prompt_keys[i])

    def response_key(self, i: int) -> bytes:
        """16 bytes, equal for rows whose response ids are equal."""
        return bytes(self.response_keys[i])
