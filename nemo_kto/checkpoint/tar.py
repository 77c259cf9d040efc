"""Reads tar files that nobody vouches for: regular files and directories inside one folder, or an error. No tensors.

Python's own reader takes a damaged header in the middle of an archive for its end; this one does not.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from nemo_kto.errors import CheckpointError

MAX_MEMBERS = 100_000
_RECORD = 512  # bytes; a header, and the unit of everything else
_BLOCK = 1 << 22  # bytes per read
_MAX_EXTENSION = 1 << 20  # bytes of a long name or of extended attributes
_GZIP = b"\x1f\x8b"
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
    b"S": "a sparse file",
}


@dataclass(frozen=True)
class Member:
    """A file or directory of an archive.

    Attributes:
        name: relative, of plain parts joined by ``/``; empty for the archive's own folder.
        size: in bytes; 0 for a directory.
        is_dir: whether it is a directory.
    """

    name: str
    size: int
    is_dir: bool


class TarReader:
    """Members of a tar file, plain or gzipped, in order, each checked before it is handed out.

    Args:
        file: open for binary reading, at its start.
        path: what messages call it.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        zipped = file.read(len(_GZIP)) == _GZIP
        file.seek(0, 2)
        self._length = None if zipped else file.tell()
        file.seek(0)
        self._file: IO[bytes] = gzip.GzipFile(fileobj=file) if zipped else file  # type: ignore[assignment]
        self._path = path
        self._left = 0  # bytes of the current member that are still to be read
        self._padding = 0
        self._names: set[str] = set()
        self._folders: set[str] = set()
        self._files: set[str] = set()

    def __iter__(self) -> Iterator[Member]:
        """Every member.

        Raises:
            CheckpointError: the archive is damaged, or holds something that no model archive holds.
        """
        try:
            yield from self._members()
        except CheckpointError:
            raise
        except Exception as error:  # whatever garbage makes gzip, int() or decode() raise
            raise CheckpointError(f"{self._path} is damaged, or no tar file: {error}") from error

    def blocks(self) -> Iterator[bytes]:
        """The current member's bytes, from where they were left.

        Raises:
            CheckpointError: the archive ends before them, or its compression is damaged.
        """
        while self._left:
            block = self._exactly(min(_BLOCK, self._left))
            self._left -= len(block)
            yield block

    def _members(self) -> Iterator[Member]:
        extended: dict[str, str] = {}
        while len(self._names) <= MAX_MEMBERS:
            header = self._exactly(_RECORD)
            if not header.strip(b"\0"):
                if self._exactly(_RECORD).strip(b"\0"):
                    raise CheckpointError(f"{self._path} is damaged: a header is blank")
                return
            size, kind = self._parsed(header), header[156:157]
            if kind in b"xgLK":
                extended |= self._extension(kind, size)
                continue
            if "size" in extended:
                size = self._fitting(int(extended["size"]))
            member = self._member(header, size, extended)
            extended = {}
            if member.name in self._names:
                raise CheckpointError(f"{self._path} holds {member.name!r} twice")
            self._remember(member)
            self._begin(member.size)
            yield member
            self._finish()
        raise CheckpointError(f"{self._path} holds more than {MAX_MEMBERS} members")

    def _parsed(self, header: bytes) -> int:
        """The size in a header whose checksum is right."""
        summed = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if summed != int(header[148:156].strip(b"\0 ") or b"-1", 8):
            raise CheckpointError(f"{self._path} is damaged, or no tar file: a header's checksum is wrong")
        return self._number(header[124:136])

    def _number(self, field: bytes) -> int:
        # GNU tar writes what octal digits cannot hold as a binary number
        binary = field[0] == 0x80
        return self._fitting(int.from_bytes(field[1:], "big") if binary else int(field.strip(b"\0 ") or b"0", 8))

    def _fitting(self, value: int) -> int:
        if value < 0 or (self._length is not None and value > self._length):
            raise CheckpointError(f"{self._path} is truncated: a member of {value} bytes does not fit in it")
        return value

    def _extension(self, kind: bytes, size: int) -> dict[str, str]:
        """Attributes of the next member that its header has no room for."""
        if size > _MAX_EXTENSION:
            raise CheckpointError(f"{self._path} is damaged: a name of {size} bytes")
        self._begin(size)
        text = b"".join(self.blocks())
        self._finish()
        if kind == b"L":
            return {"path": text.rstrip(b"\0").decode()}
        if kind == b"K":
            return {}  # the target of a link: the link itself comes next, and is refused
        values = dict(_pax(text))
        if any(key.startswith("GNU.sparse") for key in values):
            raise CheckpointError(f"{self._path} holds a sparse file, which no model archive does")
        wanted = {key: value for key, value in values.items() if key in ("path", "size")}
        if kind == b"g" and wanted:
            raise CheckpointError(f"{self._path} gives all members one {next(iter(wanted))}, as no model archive does")
        return wanted

    def _member(self, header: bytes, size: int, extended: dict[str, str]) -> Member:
        name, kind = extended.get("path", _name(header)), header[156:157]
        is_dir = kind == b"5" or (kind == b"\0" and name.endswith("/"))
        if not is_dir and kind not in (b"0", b"\0"):
            what = _KINDS.get(kind, f"a member of type {kind!r}")
            raise CheckpointError(f"{self._path}: {name!r} is {what}; only files and directories are unpacked")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts or "\0" in name or (not parts and not is_dir):
            raise CheckpointError(f"{self._path}: {name!r} would be unpacked outside its directory")
        if is_dir and size:
            raise CheckpointError(f"{self._path} is damaged: the directory {name!r} has {size} bytes")
        return Member("/".join(parts), size, is_dir)

    def _remember(self, member: Member) -> None:
        """Refuse a file where a directory is, and the reverse."""
        above = {str(parent) for parent in PurePosixPath(member.name).parents} - {"."}
        if above & self._files or (not member.is_dir and member.name in self._folders):
            raise CheckpointError(f"{self._path} holds {member.name!r} both as a file and as a directory")
        self._names.add(member.name)
        self._folders |= above
        (self._folders if member.is_dir else self._files).add(member.name)

    def _begin(self, size: int) -> None:
        self._left, self._padding = size, -size % _RECORD

    def _finish(self) -> None:
        """Skip what is left of the current member."""
        if self._length is None:
            for _ in self.blocks():
                pass
            self._exactly(self._padding)
            return
        end = self._file.seek(self._left + self._padding, 1)
        self._left = 0
        if end > self._length:
            raise CheckpointError(f"{self._path} is truncated")

    def _exactly(self, count: int) -> bytes:
        try:
            data = self._file.read(count)
        except (OSError, EOFError, zlib.error) as error:
            raise CheckpointError(f"{self._path} cannot be read: {type(error).__name__}: {error}") from error
        if len(data) != count:
            raise CheckpointError(f"{self._path} is truncated, or no tar file")
        return data


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if header[257:263] == b"ustar\0" and prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode()


def _pax(text: bytes) -> Iterator[tuple[str, str]]:
    """Records ``LENGTH KEY=VALUE`` and a newline, LENGTH counting the whole record."""
    while text:
        digits, _, _ = text.partition(b" ")
        length = int(digits)
        if not 0 < length <= len(text):
            raise ValueError("an extended header is cut short")
        record, text = text[:length], text[length:]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise ValueError("an extended header is no list of KEY=VALUE")
        yield key.decode(), value.decode(errors="surrogateescape")
