"""Which checkpoints stay: the newest, the best, and never none that is whole."""

from __future__ import annotations

import json
import math

import pytest

from nemo_kto.checkpoint.retention import LATEST, Retention
from nemo_kto.config import manifest
from nemo_kto.config.locate import checkpoint_steps


def _checkpoint(log_dir, step):
    folder = log_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{}")
    (folder / "shard").write_bytes(bytes(100))
    manifest.complete(folder, {})
    return folder


def _run(log_dir, retention, scores):
    for step, score in scores.items():
        if score is not None:
            retention.score(step, score)
        retention.published(_checkpoint(log_dir, step))
    return [step for step, _ in checkpoint_steps(log_dir)]


SCORES = {1: 0.5, 2: 0.1, 3: None, 4: 0.9, 5: 0.3, 6: 0.7, 7: None}


@pytest.mark.parametrize(
    ("mode", "last_k", "top_k", "kept"),
    [
        ("min", 1, 0, [7]),
        ("min", 2, 0, [6, 7]),
        ("min", 1, 2, [2, 5, 7]),
        ("max", 1, 2, [4, 6, 7]),
        ("min", 3, 1, [2, 5, 6, 7]),
        ("min", 1, -1, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_the_newest_and_the_best(tmp_path, mode, last_k, top_k, kept):
    (tmp_path / "checkpoints").mkdir()
    assert _run(tmp_path, Retention(tmp_path, mode, last_k, top_k), SCORES) == kept
    assert (tmp_path / LATEST).read_text() == f"{tmp_path / 'checkpoints' / 'step-000007'}\n"


def test_a_score_that_is_not_finite_is_the_worst(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    retention = Retention(tmp_path, "max", 1, 1)
    assert _run(tmp_path, retention, {1: math.nan, 2: -5.0, 3: math.inf, 4: math.nan}) == [2, 4]


def test_scores_survive_a_resume_up_to_its_step(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    _run(tmp_path, Retention(tmp_path, "min", 1, 2), {1: 0.2, 2: 0.1, 3: 0.0})
    fresh = Retention(tmp_path, "min", 1, 2)
    fresh.load_scores(up_to=2)
    fresh.score(4, 0.3)
    assert json.loads((tmp_path / "checkpoints" / "scores.json").read_text()) == {"1": 0.2, "2": 0.1, "4": 0.3}


@pytest.mark.parametrize("content", ["", "[1]", '{"one": 1}', '{"1": "x"}'])
def test_garbled_scores_are_forgotten(tmp_path, content, caplog):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "scores.json").write_text(content)
    Retention(tmp_path, "min", 1, 1).load_scores(up_to=9)
    assert "scores.json cannot be read" in caplog.text


def test_the_only_whole_one_is_not_deleted(tmp_path):
    """The new one loses a file before the old one is deleted."""
    _checkpoint(tmp_path, 1)
    new = _checkpoint(tmp_path, 2)
    (new / "shard").unlink()
    Retention(tmp_path, "min", 1, 0).published(new)
    assert [step for step, _ in checkpoint_steps(tmp_path)] == [1, 2]
