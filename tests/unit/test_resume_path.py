"""Which checkpoint a run goes on from, where a directory holds several."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_kto.config.locate import resume_path
from nemo_kto.errors import CheckpointError


def _asking_for(log_dir: Path, step: int) -> SimpleNamespace:
    return SimpleNamespace(
        explicit_log_dir=str(log_dir), resume_from_checkpoint=str(log_dir / "checkpoints" / f"step-{step:06d}")
    )


def test_an_older_step_among_later_ones_is_refused(tmp_path):
    for step in (2, 4):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "metadata.json").touch()
    assert resume_path(_asking_for(tmp_path, 4)).name == "step-000004"
    with pytest.raises(CheckpointError, match=r"step-000002, but .*step-000004 is of a run in this directory"):
        resume_path(_asking_for(tmp_path, 2))
