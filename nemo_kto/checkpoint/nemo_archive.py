"""``.nemo`` files as tar archives: packed byte for byte the same each time, unpacked with every member checked.

An archive of ours ends with a manifest of checksums; NeMo's own have none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import IO

from nemo_kto.checkpoint.tar import Member, TarReader
from nemo_kto.config import manifest
from nemo_kto.config.manifest import MANIFEST, FileRecord
from nemo_kto.errors import CheckpointError

_FORMAT = 1  # of the manifest


def pack(folder: Path, out: Path) -> None:
    """Write a directory as an archive, which is whole or absent. The same files give the same bytes.

    Args:
        folder: holds regular files and directories; no ``manifest.json`` of its own at the top.
        out: the archive; replaced if it exists.

    Raises:
        OSError: something cannot be read or written; ``out`` is as before.
    """
    draft = out.with_name(f"{out.name}.partial")
    try:
        with draft.open("wb") as file:
            _write(folder, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(out)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    manifest.sync_directory(out.parent)


def members(path: Path) -> list[Member]:
    """Everything in an archive.

    Raises:
        CheckpointError: it is damaged, or holds anything but files and directories of its own folder.
    """
    with opened(path) as file:
        return list(TarReader(file, path))


def extract(path: Path, folder: Path) -> dict[str, FileRecord]:
    """Unpack an archive into an empty directory. All of it is checked before the first file is made.

    Args:
        path: the archive.
        folder: an empty directory.

    Returns:
        What was written, by path relative to ``folder``; forced to the disk. A manifest is checked and left out.

    Raises:
        CheckpointError: the archive is damaged, unsafe or larger than the free disk, or differs from its manifest.
    """
    with opened(path) as file:
        needed = sum(member.size for member in TarReader(file, path))
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise CheckpointError(
                f"{path} needs {_gigabytes(needed)} unpacked, but {folder.parent} has {_gigabytes(free)} left: point "
                "model.data.cache_dir, or $NEMO_KTO_CACHE, to a directory that has room"
            )
        file.seek(0)
        reader = TarReader(file, path)
        # checked again as it is read: the file may have changed
        written = {member.name: _place(member, reader, folder) for member in reader}
    records = {name: record for name, record in written.items() if record is not None}
    if MANIFEST in records:
        _compare(folder, records, path)
        (folder / MANIFEST).unlink()
        del records[MANIFEST]
    return records


def _write(folder: Path, file: IO[bytes]) -> None:
    records: dict[str, FileRecord] = {}
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            entry = tarfile.TarInfo(f"./{name}")  # NeMo looks its own files up by names like this
            if path.is_dir():
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)
                continue
            entry.size = path.stat().st_size
            with path.open("rb") as source:
                hashing = _Hashing(source)
                archive.addfile(entry, hashing)
            records[name] = FileRecord(entry.size, hashing.digest.hexdigest())
        text = json.dumps(
            {"format": _FORMAT, "files": {name: asdict(record) for name, record in records.items()}}, indent=1
        ).encode()
        entry = tarfile.TarInfo(f"./{MANIFEST}")
        entry.size = len(text)
        archive.addfile(entry, BytesIO(text))


class _Hashing:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, count: int) -> bytes:
        block = self._file.read(count)
        self.digest.update(block)
        return block


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """An archive for reading.

    Raises:
        CheckpointError: it cannot be opened.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
    with file:
        yield file


def _place(member: Member, reader: TarReader, folder: Path) -> FileRecord | None:
    """Write one member, forced to the disk; None for a directory."""
    target = folder / member.name
    if member.is_dir:
        target.mkdir(parents=True, exist_ok=True)
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with target.open("xb") as file:
        for block in reader.blocks():
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(member.size, digest.hexdigest())


def _compare(folder: Path, records: dict[str, FileRecord], path: Path) -> None:
    wanted = manifest.read(folder)
    for name in sorted({*wanted, *records} - {MANIFEST}):
        if wanted.get(name) != records.get(name):
            what = "is missing" if name not in records else "is not" if name not in wanted else "differs from what is"
            raise CheckpointError(f"{path} is damaged: {name} {what} in its {MANIFEST}; copy the archive again")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
