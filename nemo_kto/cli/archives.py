"""Unpacks ``.nemo`` archives for verbs that take models. Not a verb; light where there is no archive."""

from __future__ import annotations

import logging
from pathlib import Path

from nemo_kto.config.archives import is_archive, without_archives
from nemo_kto.config.schema import Config

logger = logging.getLogger(__name__)


def unpacked(path: Path, cache_dir: str | None) -> Path:
    """A model directory: ``path`` itself, or what is in the cache, or now put there, for the archive that it is.

    Raises:
        CheckpointError: the archive cannot be used.
    """
    if not is_archive(path):
        return path
    from nemo_kto.checkpoint.nemo_model import model_directory
    from nemo_kto.data.cache import cache_root

    place = model_directory(path, cache_root(cache_dir))
    logger.info("%s is read from %s", path, place)
    return place


def unpacked_run(config: Config) -> Config:
    """A run with the model directories of its archives.

    Raises:
        CheckpointError: an archive cannot be used.
    """
    return without_archives(config, lambda path: unpacked(Path(path), config.model.data.cache_dir))
