"""Which of a run's checkpoints is whole: damaged ones are reported and set aside. Loads nothing."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch.distributed as dist

from nemo_kto.checkpoint.dist import damages
from nemo_kto.checkpoint.retention import point_to
from nemo_kto.checkpoint.together import on_first_rank
from nemo_kto.config.locate import checkpoint_steps
from nemo_kto.errors import CheckpointError

logger = logging.getLogger(__name__)

DAMAGED = ".damaged"
"""Ending of the name that a damaged checkpoint gets. It is not deleted: parts of it may be worth something."""


def whole_checkpoint(asked: Path, log_dir: Path) -> Path:
    """A checkpoint whose every byte is as it was written. All ranks call it.

    Where ``asked`` is one of the run's own, damaged ones are renamed, so that the run can write those steps again, and
    the newest that is whole is taken. One that lies elsewhere was asked for by name, and no other can stand in.

    Args:
        asked: the newest checkpoint of the run, or another one.
        log_dir: the run's directory.

    Raises:
        CheckpointError: none is whole; then nothing is renamed.
    """
    if asked.resolve().parent == (log_dir / "checkpoints").resolve():
        return _newest_whole(log_dir)
    found = damages(asked)
    if found:
        raise CheckpointError(f"exp_manager.resume_from_checkpoint={asked} is damaged: {'; '.join(found[:3])}")
    return asked


def _newest_whole(log_dir: Path) -> Path:
    damaged: list[tuple[Path, list[str]]] = []
    for _, path in reversed(checkpoint_steps(log_dir)):
        found = damages(path)
        if not found:
            _report(damaged)
            _set_aside([path for path, _ in damaged])
            if damaged:
                on_first_rank(partial(point_to, log_dir, path), f"{log_dir} cannot be written")
            return path
        damaged.append((path, found))
    listed = "\n".join(f"  {found[0]}" for _, found in damaged)
    raise CheckpointError(
        f"no checkpoint in {log_dir / 'checkpoints'} is whole:\n{listed}\nrestore one of them from a copy, or choose "
        "another exp_manager.explicit_log_dir to start anew"
    )


def _report(damaged: list[tuple[Path, list[str]]]) -> None:
    for path, found in damaged if dist.get_rank() == 0 else ():
        logger.error("%s is damaged and not used: %s", path, "; ".join(found[:3]))


def _set_aside(paths: list[Path]) -> None:
    def rename() -> None:
        for path in paths:
            target, number = path.with_name(f"{path.name}{DAMAGED}"), 1
            while target.exists():
                number += 1
                target = path.with_name(f"{path.name}{DAMAGED}-{number}")
            path.rename(target)

    on_first_rank(rename, "a damaged checkpoint cannot be renamed")
