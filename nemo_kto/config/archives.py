"""Which of a run's models are ``.nemo`` archives, and the run with what they unpack to in their place. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nemo_kto.config.schema import Config

SUFFIX = ".nemo"


def is_archive(path: str | Path) -> bool:
    """Whether a path names a ``.nemo`` file; whether it is a good one is found when it is read."""
    return Path(path).suffix == SUFFIX and Path(path).is_file()


def without_archives(config: Config, unpack: Callable[[str], Path]) -> Config:
    """The run with model directories instead of archives.

    Args:
        config: the run.
        unpack: from an archive's path to a model directory; not called where there is no archive.
    """

    def directory(path: str) -> str:
        return str(unpack(path)) if is_archive(path) else path

    policy, kto = config.pretrained_checkpoint, config.model.kto
    return replace(
        config,
        pretrained_checkpoint=replace(policy, restore_from_path=directory(policy.restore_from_path)),
        model=replace(config.model, kto=replace(kto, reference_from_path=directory(kto.reference_from_path))),
    )
