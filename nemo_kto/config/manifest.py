"""What a checkpoint directory must hold, byte for byte: written last, checked first. Files only, no tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nemo_kto.errors import CheckpointError

MANIFEST = "manifest.json"
_FORMAT = 1
_BLOCK = 1 << 22  # bytes per read


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written."""

    bytes: int
    sha256: str


def settle(path: Path) -> FileRecord:
    """Force a file's bytes to the disk, and return what they are.

    Raises:
        OSError: it cannot be read, or the disk refuses it.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return record(path)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that readers, and a machine that loses power, see the old or the new one, never half."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Force the names in a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def complete(folder: Path, known: Mapping[str, FileRecord]) -> None:
    """Make a directory durable and write its manifest, which makes it whole.

    Args:
        folder: holds everything but the manifest.
        known: files that whoever wrote them has settled already, by path relative to ``folder``.

    Raises:
        OSError: something cannot be read or written.
    """
    names = sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())
    records = {name: known[name] if name in known else settle(folder / name) for name in names if name != MANIFEST}
    text = json.dumps(
        {"format": _FORMAT, "files": {name: asdict(record) for name, record in records.items()}}, indent=1
    )
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        sync_directory(inner)
    write_text(folder / MANIFEST, text)


def read(folder: Path) -> dict[str, FileRecord]:
    """The manifest of a directory: what it must hold, by relative path.

    Raises:
        CheckpointError: there is none, it cannot be read, or it names a file outside ``folder``.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {found['format']}, which this version does not know")
        return {_inside(name, path): _parsed(record) for name, record in found["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no {MANIFEST}: it is incomplete, or not one of our checkpoints"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def problems(folder: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a directory, as lines; empty where every byte is as it was written.

    Several processes may share the work: each reads its part of the files' bytes.

    Args:
        folder: the directory.
        part: which share of the files to read, from 0.
        parts: number of shares.
    """
    try:
        wanted = read(folder)
    except CheckpointError as error:
        return [str(error)]
    by_size = sorted(wanted, key=lambda name: (-wanted[name].bytes, name))
    return [line for name in by_size[part::parts] for line in _compare(folder, name, wanted[name])]


def sizes_match(folder: Path) -> bool:
    """Whether every file is there in its length: the quick check, which reads the manifest alone."""
    try:
        return all((folder / name).stat().st_size == record.bytes for name, record in read(folder).items())
    except (CheckpointError, OSError):
        return False


def identity(folder: Path) -> str:
    """SHA-256 of the manifest, hence of everything in the directory.

    Raises:
        CheckpointError: there is no manifest.
    """
    read(folder)
    return record(folder / MANIFEST).sha256


def record(path: Path) -> FileRecord:
    """Length and checksum of a file as it is now.

    Raises:
        OSError: it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def _compare(folder: Path, name: str, wanted: FileRecord) -> list[str]:
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return [f"{path} is a link to a file outside the directory"]
    try:
        size = path.stat().st_size
        if size != wanted.bytes:
            return [f"{path} has {size} bytes, not {wanted.bytes}"]
        return [] if record(path) == wanted else [f"{path} has changed since it was written"]
    except FileNotFoundError:
        return [f"{path} is missing"]
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}"]


def _inside(name: str, manifest: Path) -> str:
    parts = PurePosixPath(name).parts
    # what cannot be printed is no name that we write, and half a surrogate is not even one that a system call takes
    if not parts or name.startswith("/") or ".." in parts or not name.isprintable():
        raise CheckpointError(f"{manifest} names {name!r}, which lies outside its directory")
    return name


def _parsed(record: Any) -> FileRecord:
    size, digest = record["bytes"], record["sha256"]
    if isinstance(size, bool) or not isinstance(size, int) or not isinstance(digest, str):
        raise ValueError(f"{record!r} is no record of a file")
    return FileRecord(size, digest)
