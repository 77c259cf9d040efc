"""One build of a token store for all processes and runs that need it. Not for what is in it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from nemo_kto.config.identity import FileDigests
from nemo_kto.data.encode import EncodeSettings
from nemo_kto.data.readers import SUFFIXES
from nemo_kto.data.store import TokenStore, is_intact
from nemo_kto.errors import DataError

CODE_VERSION = 1
"""To be raised whenever the same text and settings would become other tokens, or the files of a store change."""

_TOKENIZER_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe", ".spm", ".vocab"}
_NOT_TOKENIZER = ("generation_config.json", ".index.json")
_BLOCK = 1 << 20  # bytes per read
_ATTEMPTS = 3  # builds that come out broken before the disk is blamed

logger = logging.getLogger(__name__)


def cache_root(cache_dir: str | None) -> Path:
    """Where stores live: ``model.data.cache_dir``, else ``$NEMO_KTO_CACHE``, else ``~/.cache/nemo_kto``."""
    return Path(cache_dir or os.environ.get("NEMO_KTO_CACHE") or "~/.cache/nemo_kto").expanduser()


def digest_files(files: Sequence[str], tokenizer_path: str | Path) -> FileDigests:
    """Read every byte that tokens come from."""
    tokenizer = Path(tokenizer_path)
    return FileDigests(
        data=tuple((file, _sha256(Path(file))) for file in files),
        tokenizer=tuple((str(f.relative_to(tokenizer)), _sha256(f)) for f in _tokenizer_files(tokenizer)),
    )


def fingerprint(digests: FileDigests, settings: EncodeSettings) -> str:
    """A name for the store of these files: it changes with any byte of data or tokenizer, and with any setting.

    Names and times of files do not matter, so a copy on another machine finds the same store.
    """
    parts = {
        "code": CODE_VERSION,
        "libraries": [metadata.version(name) for name in ("transformers", "tokenizers")],
        "settings": asdict(settings),
        "tokenizer": digests.tokenizer,
        "data": [(_suffix(file), digest) for file, digest in digests.data],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _suffix(file: str) -> str:
    """The part of the name that decides how the bytes are read."""
    return next(suffix for suffix in SUFFIXES if file.lower().endswith(suffix))


def _tokenizer_files(path: Path) -> list[Path]:
    candidates = [*path.iterdir(), *path.glob("additional_chat_templates/*")]
    return sorted(
        f
        for f in candidates
        if f.suffix in _TOKENIZER_SUFFIXES and f.is_file() and not f.name.endswith(_NOT_TOKENIZER)
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def open_or_build(root: Path, key: str, build: Callable[[Path], None]) -> TokenStore:
    """Open the intact store named ``key`` under ``root``; if there is none, build it once and open it.

    May be called by any number of processes at once, on several machines that share the file system: one builds, the
    others wait. A builder that dies frees its lock with its last breath, and the next in line builds. What others see
    is a whole store or none: it is built aside and renamed. A damaged store is noticed by its checksums and replaced.

    Args:
        root: made if absent.
        key: from :func:`fingerprint`.
        build: writes a store into the empty directory that it is given.

    Raises:
        DataError: if ``root`` cannot be written, or a store cannot be read back as it was written.
    """
    place = root / f"tokens-{key}"
    try:
        for _ in range(_ATTEMPTS):
            stamp = _stamp(place)
            if is_intact(place):
                return TokenStore(place)
            if stamp is not None:
                logger.warning("the token cache in %s is damaged; building it again", place)
            root.mkdir(parents=True, exist_ok=True)
            with _exclusive(root / f"tokens-{key}.lock"):
                # Whoever held the lock before may have built the store: then the stamp is a new one.
                if _stamp(place) == stamp:
                    _build_aside(place, build)
    except OSError as error:
        raise DataError(
            f"the token cache in {root} cannot be written or read ({error}); point model.data.cache_dir, or "
            "$NEMO_KTO_CACHE, to a directory that is writable and has room"
        ) from error
    raise DataError(f"the token cache in {place} does not read back as it was written; check that file system")


def _stamp(place: Path) -> tuple[int, int] | None:
    """Changes whenever the store is replaced; None while there is none."""
    try:
        status = place.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel releases when this process ends, however it ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is tokenising the data; waiting for it (%s)", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # A file system without locks: several processes may build, and the first rename wins.
            logger.warning("%s cannot be locked (%s); every process that needs the token cache builds it", path, error)
        yield


def _build_aside(place: Path, build: Callable[[Path], None]) -> None:
    for leftover in place.parent.glob(f"{place.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a builder that died: its lock is ours now
    aside = place.with_name(f"{place.name}.tmp-{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        build(aside)
        _install(aside, place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _install(aside: Path, place: Path) -> None:
    """Rename ``aside`` to ``place``, unless an intact store got there first."""
    if place.exists():
        if is_intact(place):
            return
        damaged = place.with_name(f"{place.name}.tmp-{uuid.uuid4().hex}")
        place.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    aside.rename(place)
