"""Skipped steps: counted, written down with their records, and the end of the run when there are too many in a row."""

from __future__ import annotations

import json
import math

import pytest

from nemo_kto.config.schema import OptimConfig, ScheduleConfig
from nemo_kto.errors import TooManySkipsError
from nemo_kto.training.schedule import learning_rate
from nemo_kto.training.skipped import SkippedSteps

NAN = math.nan


def records(consumed_samples):
    return [f"data.jsonl:{line}" for line in range(consumed_samples - 3, consumed_samples + 1)]


def run(skips, taken, *, first=1, writes=True):
    """One step after the other, as the training makes them; ``taken`` says which moved the weights."""
    for step, moved in enumerate(taken, first):
        skips.count(taken=moved)
        skips.report(step, 4 * step, 0.5 if moved else NAN, 1.0, writes=writes)


def lines(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def test_every_skipped_step_is_a_line_and_a_warning(tmp_path, caplog):
    skips = SkippedSteps(tmp_path, 3, records)
    run(skips, [True, False, True, False, False, True])
    assert skips.total == 3
    assert [(line["step"], line["consumed_samples"]) for line in lines(tmp_path)] == [(2, 8), (4, 16), (5, 20)]
    assert lines(tmp_path)[0] == {
        "step": 2,
        "consumed_samples": 8,
        "reason": "the loss is nan",
        "loss": None,
        "grad_norm": 1.0,
        "records": ["data.jsonl:5", "data.jsonl:6", "data.jsonl:7", "data.jsonl:8"],
    }
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 3
    assert caplog.records[1].getMessage().startswith("step 4 is skipped: the loss is nan; ")


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (0.5, math.inf, "the gradient norm is inf"),
        (-math.inf, NAN, "the loss is -inf"),
        (0.5, 1.0, "a gradient on another rank is not finite"),
    ],
)
def test_the_reason_is_said(tmp_path, loss, norm, reason):
    skips = SkippedSteps(tmp_path, 0, records)
    skips.count(taken=False)
    skips.report(1, 4, loss, norm, writes=True)
    assert lines(tmp_path)[0]["reason"] == reason


@pytest.mark.parametrize("writes", [True, False])
def test_too_many_in_a_row_end_the_run_on_every_rank(tmp_path, writes):
    skips = SkippedSteps(tmp_path, 3, records)
    run(skips, [False, False, True, False, False], writes=writes)
    with pytest.raises(TooManySkipsError) as stopped:
        run(skips, [False], first=6, writes=writes)
    said = str(stopped.value)
    assert "3 steps in a row were skipped (trainer.kto.max_consecutive_skips), the last of them step 6" in said
    assert "the loss is nan" in said
    assert "data.jsonl:21, data.jsonl:22, data.jsonl:23, data.jsonl:24; " in said
    assert (tmp_path / "skipped.jsonl").exists() == writes
    assert not writes or len(lines(tmp_path)) == 5


def test_a_large_batch_is_named_in_part(tmp_path):
    skips = SkippedSteps(tmp_path, 1, lambda _: [f"f:{i}" for i in range(512)])
    with pytest.raises(TooManySkipsError, match=r"f:14, f:15 \.\.\.; "):
        run(skips, [False])
    assert len(lines(tmp_path)[0]["records"]) == 512


def test_no_limit(tmp_path):
    skips = SkippedSteps(tmp_path, 0, records)
    run(skips, [False] * 100)
    assert skips.total == 100


def test_counts_survive_a_checkpoint(tmp_path):
    before = SkippedSteps(tmp_path, 3, records)
    run(before, [False, True, False, False])
    after = SkippedSteps(tmp_path, 3, records)
    after.load({"consumed_samples": 16, **before.state()})
    assert after.total == 3
    with pytest.raises(TooManySkipsError, match="3 steps in a row"):
        run(after, [False], first=5)


def test_a_checkpoint_without_counts_begins_at_none(tmp_path):
    skips = SkippedSteps(tmp_path, 3, records)
    skips.load({"consumed_samples": 16})
    assert skips.state() == {"skipped_steps": 0, "consecutive_skips": 0}


def test_a_run_that_goes_back_drops_its_later_lines(tmp_path):
    run(SkippedSteps(tmp_path, 0, records), [False] * 4)
    SkippedSteps(tmp_path, 0, records).go_back_to(2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_the_schedule_waits_for_a_skipped_step(tmp_path):
    optim = OptimConfig("adamw", 1.0, 0.0, [0.9, 0.9], 1e-8, 0.0, False, False, ScheduleConfig("Constant", 4, 0, 0.0))
    skips, rates = SkippedSteps(tmp_path, 0, records), []
    for step, moved in enumerate([True, False, False, True, True]):
        rates.append(learning_rate(skips.taken(step), optim, 10))
        skips.count(taken=moved)
    assert rates == [0.2, 0.4, 0.4, 0.4, 0.6]


def test_a_larger_batch_than_before_the_skips_does_not_begin_before_the_schedule(tmp_path):
    skips = SkippedSteps(tmp_path, 0, records)
    skips.load({"skipped_steps": 8})
    assert skips.taken(3) == 0
