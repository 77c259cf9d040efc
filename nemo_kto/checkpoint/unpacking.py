"""Archives unpacked into a cache: once, under a lock, and found again by their bytes. Not for what is in them."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_kto.checkpoint.nemo_archive import extract, opened
from nemo_kto.config import manifest
from nemo_kto.config.manifest import FileRecord
from nemo_kto.errors import CheckpointError

Records = dict[str, FileRecord]
Settle = Callable[[Path, Records], Records]
"""Brings unpacked files into the shape that is kept: (folder, its files) -> those of them that stay as they are."""
_BLOCK = 1 << 22  # bytes per read
_TICK_NS = 2 * 10**9  # a file changed this recently may change again within one tick of its time stamps

logger = logging.getLogger(__name__)


def unpack(path: str | Path, root: Path, kind: str, settle: Settle) -> Path:
    """The contents of an archive as a directory under ``root``, made once and found again by the archive's bytes.

    May be called by any number of processes at once: one unpacks, the others wait. What others see is whole or not
    there. A directory that lost files is made again.

    Args:
        path: the archive.
        root: made if absent.
        kind: of contents that ``settle`` makes; goes into the directory's name.
        settle: brings the unpacked files into the shape that is kept; what it raises is raised here.

    Raises:
        CheckpointError: the archive is bad (:func:`extract`), or ``root`` cannot be written.
    """
    path = Path(path)
    try:
        root.mkdir(parents=True, exist_ok=True)
        place = root / f"{kind}-{_digest(path, root)[:32]}"
        if manifest.sizes_match(place):
            return place
        with _exclusive(root / f"{place.name}.lock", path) as alone:
            if not manifest.sizes_match(place):
                _unpack_aside(path, place, settle, alone=alone)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be unpacked in {root} ({error}); point model.data.cache_dir, or $NEMO_KTO_CACHE, to a "
            "directory that is writable and has room"
        ) from error
    return place


def _digest(path: Path, root: Path) -> str:
    """SHA-256 of a file, remembered as long as the file system says that it is the same file, unchanged."""
    stamp = _stamp(path)
    note = root / f"nemo-digest-{hashlib.sha256(repr(stamp).encode()).hexdigest()[:32]}"
    if note.is_file():
        return note.read_text(encoding="utf-8")
    with _exclusive(note.with_suffix(".lock"), path):
        if note.is_file():  # made by the process that held the lock before
            return note.read_text(encoding="utf-8")
        digest = hashlib.sha256()
        with opened(path) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        if _stamp(path) != stamp:
            raise CheckpointError(f"{path} is being written: try again when it is whole")
        if time.time_ns() - max(stamp[-2:]) > _TICK_NS:
            manifest.write_text(note, digest.hexdigest())
        return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int, int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@contextmanager
def _exclusive(lock: Path, path: Path) -> Iterator[bool]:
    """Hold a lock that the kernel releases when this process ends; False where the file system has none."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is reading %s; waiting for it (%s)", path, lock)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked (%s); every process that needs %s unpacks it", lock, error, path)
            yield False
            return
        yield True


def _unpack_aside(path: Path, place: Path, settle: Settle, *, alone: bool) -> None:
    if alone:
        for leftover in place.parent.glob(f"{place.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)  # of a process that died: its lock is ours now
    aside = place.with_name(f"{place.name}.tmp-{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        logger.info("unpacking %s to %s", path, place)
        manifest.complete(aside, settle(aside, extract(path, aside)))
        if place.exists() and not manifest.sizes_match(place):
            damaged = place.with_name(f"{place.name}.tmp-{uuid.uuid4().hex}")
            place.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        if not place.exists():
            aside.rename(place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
