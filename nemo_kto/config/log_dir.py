"""The directory of a run: whether it can be used, and by one run at a time. Standard library only."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

from nemo_kto.config.locate import checkpoint_steps
from nemo_kto.config.manifest import MANIFEST
from nemo_kto.errors import ConfigError

CONFIG_HEADER = "# The resolved config of a nemo_kto run, written at every start.\n"
"""First line of a run's ``config.yaml``: a file without it is somebody else's."""
_CONFIG, _REFERENCE, _LOCK = "config.yaml", "reference", ".lock"
_FOLDERS = {"checkpoints": True, _REFERENCE: True, "metrics.jsonl": False, _CONFIG: False}
_held: dict[Path, IO[str]] = {}
"""Locks of this process. Closing any handle of the file would give the lock away."""

logger = logging.getLogger(__name__)


def check_log_dir(log_dir: Path) -> None:
    """Make the directory if need be, and refuse what a run cannot write to, or would destroy.

    Raises:
        ConfigError: names the path and the fix.
    """
    key = f"exp_manager.explicit_log_dir={log_dir}"
    if log_dir.exists() and not log_dir.is_dir():
        raise ConfigError(f"{key} is a file: name a directory")
    for name, is_folder in _FOLDERS.items():
        path = log_dir / name
        if path.exists() and path.is_dir() != is_folder:
            raise ConfigError(f"{key}: {path} is a {'file' if is_folder else 'directory'}, remove it")
    _refuse_foreign(log_dir, key)
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        probe = log_dir / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{key} cannot be written ({error.strerror}): name another directory") from error


def _refuse_foreign(log_dir: Path, key: str) -> None:
    """A run replaces its own reference and config. Without one of its checkpoints, look whose they are."""
    if checkpoint_steps(log_dir):
        return
    reference, config = log_dir / _REFERENCE, log_dir / _CONFIG
    if reference.is_dir() and any(reference.iterdir()) and not (reference / MANIFEST).is_file():
        raise ConfigError(
            f"{key}: a run keeps its reference policy in {reference}, which is not of a run: name another directory"
        )
    if config.is_file() and not (log_dir / "metrics.jsonl").exists():
        with config.open(encoding="utf-8", errors="replace") as file:
            if file.readline() != CONFIG_HEADER:
                raise ConfigError(
                    f"{key}: a run writes its settings to {config}, which is not of a run: name another directory"
                )


def write_config(log_dir: Path, text: str) -> None:
    """Write ``config.yaml``, whole or not at all.

    Raises:
        ConfigError: the directory cannot be written, or the disk is full.
    """
    path = log_dir / _CONFIG
    draft = path.with_name(f".{path.name}.partial")
    try:
        draft.write_text(CONFIG_HEADER + text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise ConfigError(f"{path} cannot be written ({error.strerror}): name another directory") from error


def claim(log_dir: Path) -> None:
    """Hold the directory for this process until it ends, however it ends. One process of a run calls it.

    Where the file system knows no locks, that is said, and nothing is held.

    Raises:
        ConfigError: another run holds it.
    """
    path = (log_dir / _LOCK).resolve()
    if path in _held:
        return
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror})") from error
    if not _locked(file, path):
        file.close()
        raise ConfigError(
            f"exp_manager.explicit_log_dir={log_dir} is in use by another run ({_holder(path)}): let it end, or name "
            "another directory"
        )
    _held[path] = file
    with suppress(OSError):  # a full disk; the note only helps whoever finds the directory in use
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def _locked(file: IO[str], path: Path) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        logger.warning("%s cannot be locked (%s): see to it that no two runs share this directory", path, error)
    return True


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "unknown"
    except OSError:
        return "unknown"
