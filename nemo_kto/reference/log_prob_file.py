"""Sequence log-probs on disk: append-only files of records of one size, one writer each. Knows no rows and no models.

A file is a header of 64 bytes and records of 32 bytes, all little-endian:

    header  16 bytes magic, uint32 version, uint32 record size, 32 bytes identity, uint32 CRC-32 of those, 4 bytes 0
    record  16 bytes key, float64 nats, uint32 tokens, uint32 CRC-32 of those 28 bytes

A record that is damaged or cut off is left out, and no other with it: every record stands where its number says.
"""

from __future__ import annotations

import os
import struct
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nemo_kto.config.manifest import sync_directory

SUFFIX = ".logps"
VERSION = 1
"""Of the file's layout. What the numbers mean is the business of the identity."""
RECORD = np.dtype([("key", "<u8", (2,)), ("logp", "<f8"), ("tokens", "<u4"), ("crc", "<u4")])
_MAGIC = b"nemo_kto logprob"
_HEADER = struct.Struct("<16sII32s")
_HEADER_BYTES = 64
_BLOCK = 1 << 16  # records per look: they fit into a processor's cache

Keys: TypeAlias = NDArray[np.uint64]
"""[n, 2]: 128-bit keys."""


class ForeignFileError(Exception):
    """A file is of another kind, version or identity. The message says what."""


@dataclass(frozen=True)
class Found:
    """What was read of a file.

    Attributes:
        keys: [n, 2] uint64, keys of the whole records.
        logps: [n] float64, nats.
        damaged: records that were left out.
        end: bytes of the file that have been read; the next reading starts there.
    """

    keys: Keys
    logps: NDArray[np.float64]
    damaged: int
    end: int


def make_records(keys: Sequence[bytes], logps: Sequence[float], tokens: Sequence[int]) -> NDArray[Any]:
    """[n] records.

    Args:
        keys: 16 bytes each.
        logps: nats, of each key.
        tokens: scored tokens, of each key.
    """
    records = np.zeros(len(keys), RECORD)
    records["key"] = as_keys(keys)
    records["logp"], records["tokens"] = logps, tokens
    records["crc"] = checksums(records)
    return records


def as_keys(keys: Sequence[bytes]) -> Keys:
    """[n, 2] uint64 of 16 bytes each."""
    return np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)


def _table() -> NDArray[np.uint32]:
    """[65536] uint32: what two more bytes do to a CRC-32."""
    table = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(16):
        table = np.where(table & np.uint32(1), (table >> np.uint32(1)) ^ np.uint32(0xEDB88320), table >> np.uint32(1))
    return table


_TABLE = _table()


def checksums(records: NDArray[Any]) -> NDArray[np.uint32]:
    """[n] uint32: CRC-32 (zlib's) of each record's bytes but the last four, all records at once."""
    pairs = np.ascontiguousarray(records).view("<u2").reshape(-1, RECORD.itemsize // 2).T.copy()
    crc = np.full(pairs.shape[1], 0xFFFFFFFF, np.uint32)
    for pair in pairs[:-2]:
        crc = _TABLE[(crc ^ pair) & np.uint32(0xFFFF)] ^ (crc >> np.uint32(16))
    return ~crc


def header(identity: bytes) -> bytes:
    """The first bytes of a file.

    Args:
        identity: 32 bytes, of what the numbers are of.
    """
    assert len(identity) == 32
    body = _HEADER.pack(_MAGIC, VERSION, RECORD.itemsize, identity)
    return (body + struct.pack("<I", zlib.crc32(body))).ljust(_HEADER_BYTES, b"\0")


def read(path: Path, identity: bytes, start: int = 0) -> Found:
    """Read what a file holds from a byte on, through a memory map. Its writer may be appending meanwhile.

    Args:
        path: the file.
        identity: that it must have.
        start: :attr:`Found.end` of the reading before; 0 for the first.

    Raises:
        ForeignFileError: it is none of this version and identity. Nothing of it is used.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size < _HEADER_BYTES:
        return _found([], 0, 0)  # its writer has just begun, or died there
    if start == 0:
        with path.open("rb") as file:
            _check_header(file.read(_HEADER_BYTES), identity)
        start = _HEADER_BYTES
    count = (size - start) // RECORD.itemsize
    if count <= 0:
        return _found([], 0, start)
    try:
        mapped = np.memmap(path, RECORD, "r", offset=start, shape=(count,))
    except ValueError as error:  # it has shrunk since: no writer of ours does that
        raise OSError(f"{path} became shorter while it was read") from error
    whole = []
    for first in range(0, count, _BLOCK):
        block = np.array(mapped[first : first + _BLOCK])
        whole.append(block[block["crc"] == checksums(block)])
    return _found(whole, count - sum(map(len, whole)), start + count * RECORD.itemsize)


def _found(blocks: Sequence[NDArray[Any]], damaged: int, end: int) -> Found:
    keys = np.concatenate([np.zeros((0, 2), np.uint64), *(block["key"] for block in blocks)])
    logps = np.concatenate([np.zeros(0), *(block["logp"] for block in blocks)])
    return Found(keys, logps, damaged, end)


def _check_header(found: bytes, identity: bytes) -> None:
    magic, version, size, owner = _HEADER.unpack(found[: _HEADER.size])
    if magic != _MAGIC:
        raise ForeignFileError("it is no file of log-probs")
    if version != VERSION or size != RECORD.itemsize:
        raise ForeignFileError(f"it has version {version}, and this program writes version {VERSION}")
    if found != header(owner):
        raise ForeignFileError("its header is damaged")
    if owner != identity:
        raise ForeignFileError("it holds log-probs of another reference")


class RecordWriter:
    """Appends to a file of its own, which is made with the first records and has a name that no other has.

    Every append is one write, so that a process that is killed leaves whole records. After an append that failed the
    file may end in half a record: nothing may be appended any more.

    Args:
        folder: made if absent.
        identity: see :func:`header`.
    """

    def __init__(self, folder: Path, identity: bytes) -> None:
        self.path = folder / f"{uuid.uuid4().hex}{SUFFIX}"
        self._identity = identity
        self._handle: int | None = None

    def append(self, records: NDArray[Any]) -> None:
        """Append [n] records; they are in the system's hands then, and other processes see them.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        data = records.tobytes()
        if self._handle is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            data = header(self._identity) + data
        while data:
            data = data[os.write(self._handle, data) :]

    def flush(self) -> None:
        """Force what was appended to the disk.

        Raises:
            OSError: the disk refuses it.
        """
        if self._handle is not None:
            os.fsync(self._handle)
            sync_directory(self.path.parent)

    def close(self) -> None:
        """Let the file go. Nothing is forced to the disk."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
