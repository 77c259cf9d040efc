"""Real runs of ``nemo-kto train`` on the tiny model: alone, on two processes, under torchrun, resumed, cut short."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import train_runs
from train_runs import BATCH, BETA, HELDOUT, ROWS, STEPS_PER_EPOCH

pytestmark = pytest.mark.integration

LOSS, NORM = 1e-5, 1e-4
"""Relative, between layouts in fp32 (design section 5): float32 sums in another order."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return train_runs.make_files(tmp_path_factory.mktemp("train"), ROWS, HELDOUT)


# --- without interruption, and with one


def test_steps_epochs_and_samples_are_counted(whole):
    assert [line["step"] for line in whole.training] == list(range(1, 9))
    assert [line["consumed_samples"] for line in whole.training] == [BATCH * step for step in range(1, 9)]
    assert [line["epoch"] for line in whole.training] == [step / STEPS_PER_EPOCH for step in range(1, 9)]
    assert [line["lr"] for line in whole.training[:3]] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert [line["step"] for line in whole.validation] == [2, 4, 6, 8]
    assert {line["val/num_desirable"] + line["val/num_undesirable"] for line in whole.validation} == {HELDOUT}


def test_the_first_step_starts_at_the_reference(whole):
    first = whole.training[0]
    assert (first["kl"], first["rewards/margins"], first["loss"]) == (0.0, 0.0, 1.0)
    assert whole.training[-1]["rewards/margins"] != 0.0


def test_checkpoints_are_saved_on_the_interval_after_validation_and_at_the_end(whole):
    assert whole.checkpoints == [2, 3, 4, 6, 8]
    assert (whole.out / "latest_checkpoint.txt").read_text() == "whole/checkpoints/step-000008\n"
    kept = {"config.yaml", "metrics.jsonl", "checkpoints", "reference"}
    assert {path.name for path in whole.out.iterdir()} >= kept
    assert list(whole.out.glob("**/events.out.tfevents*"))


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(whole, halves):
    """Same layout, shuffled, read by two workers, over the end of an epoch."""
    assert halves.training == whole.training
    assert halves.validation == whole.validation
    assert halves.checkpoints == whole.checkpoints


def test_resuming_is_said(halves):
    assert "info: resuming from halves/checkpoints/step-000004, step 4" in halves.stderr.splitlines()


def test_what_a_user_sees_is_ours(whole):
    """No line of Megatron, NeMo, Lightning or torch."""
    steps = [f"step {step}/8" for step in (1, 2, 3, 8)]
    expected = {
        *(
            "world 1 = 1 node x 1 (alone), TP 1 x PP 1 x DP 1; rank 0 ",
            "training data: 22 rows",
            "validation data: 6 rows",
        ),
        *("8 steps of 4 samples, 5 per epoch, 2 rows left over in each", "done: 8 steps, whole/checkpoints"),
        *(
            "next: nemo-kto convert megatron-to-hf --input whole/",
            "info: tokenised: 22 rows",
            "info: tokenised: 6 rows",
        ),
        *(f"{step}  loss " for step in steps),
        *(f"step {step}  val/loss " for step in (2, 4, 6, 8)),
        *(f"info: saved step-{step:06d}, training waited " for step in (2, 3, 4, 6, 8)),
    }
    lines = [line for line in (whole.stdout + whole.stderr).splitlines() if line]
    middle = [line for line in lines if any(line.startswith(f"step {step}/8  loss ") for step in range(4, 8))]
    unknown = [line for line in lines if not line.startswith(tuple(expected)) and line not in middle]
    assert unknown == []
    assert [prefix for prefix in expected if not any(line.startswith(prefix) for line in lines)] == []


# --- validation leaves no trace


def test_validation_does_not_change_training(watched, unwatched, whole):
    """Bit for bit, with dropout: it draws nothing from the random streams."""
    assert watched.training == unwatched.training
    assert len(watched.training) == 6
    assert watched.training[1]["loss"] != whole.training[1]["loss"], "dropout was off"


def test_limits_and_intervals(watched, unwatched):
    assert [line["epoch"] for line in watched.training] == [step / 3 for step in range(1, 7)]
    assert [line["step"] for line in watched.validation] == list(range(1, 7))
    assert {line["val/num_desirable"] + line["val/num_undesirable"] for line in watched.validation} == {BATCH}
    assert unwatched.validation == []


def test_the_best_and_the_two_newest_checkpoints_stay(watched, unwatched):
    best = min(watched.validation, key=lambda line: line["val/rewards/margins"])["step"]
    assert best < 5
    assert watched.checkpoints == [best, 5, 6]
    assert unwatched.checkpoints == [6]


# --- several processes


def test_two_processes_of_its_own(two):
    assert two.stdout.startswith("world 2 = 1 node x 2 (nemo-kto), TP 2 x PP 1 x DP 1; ranks 0-1 ")
    assert "; gloo over " in two.stdout.splitlines()[0]
    assert [line["step"] for line in two.training] == [1, 2, 3]
    assert [line["step"] for line in two.validation] == [2], "half of 5 steps, rounded down"
    ours = ("step ", "info: ")
    assert [line for line in two.stderr.splitlines() if not line.startswith(ours)] == []


def test_the_reference_may_be_another_model(two, whole):
    """On the first batch: reward = beta (log pi_other - log pi_model), both as they were before any step."""
    for label in ("chosen", "rejected"):
        expected = BETA * (two.training[0][f"logps/{label}"] - whole.training[0][f"logps/{label}"])
        # two sums of float32 log-probs, some -100 nats each, under two layouts
        assert two.training[0][f"rewards/{label}"] == pytest.approx(expected, abs=1e-4)
        assert abs(expected) > 0.1


def test_torchrun_trains_the_same(launched, whole):
    assert launched.stdout.startswith("world 2 = 1 node x 2 (torchrun), TP 1 x PP 1 x DP 2; ranks 0-1 ")
    assert len(launched.training) == 4
    for found, expected in zip(launched.training, whole.training, strict=False):
        assert found["loss"] == pytest.approx(expected["loss"], rel=LOSS)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=NORM)
        assert found["tokens"] > 0
        assert found["consumed_samples"] == expected["consumed_samples"]


# --- out of time, in bf16


def test_a_run_out_of_time_can_be_resumed(timed):
    stopped, steps, checkpoints, resumed = timed
    done = steps[-1]["step"]
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith(f"error: stopped by exp_manager.max_time_per_run after step {done} of 500000; ")
    assert checkpoints == [done]
    assert [line["step"] for line in resumed.training] == list(range(1, done + 3))
    assert resumed.training[:done] == steps
    assert resumed.checkpoints == [done, done + 2]


# --- the runs, two at a time: most use one core


@pytest.fixture(scope="module")
def jobs(root):
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(job, root) for name, job in train_runs.JOBS.items()}


@pytest.fixture
def whole(jobs):
    return jobs["whole"].result()


@pytest.fixture
def halves(jobs):
    return jobs["halves"].result()


@pytest.fixture
def watched(jobs):
    return jobs["watched"].result()


@pytest.fixture
def unwatched(jobs):
    return jobs["unwatched"].result()


@pytest.fixture
def two(jobs):
    return jobs["two"].result()


@pytest.fixture
def launched(jobs):
    return jobs["launched"].result()


@pytest.fixture
def timed(jobs):
    return jobs["timed"].result()


def test_steps_can_be_traced(two):
    found = sorted(path.name for path in (two.out / "profile").iterdir())
    assert found == ["table-rank-0.txt", "table-rank-1.txt", "trace-rank-0.json.gz", "trace-rank-1.json.gz"]
    for rank in range(2):
        with gzip.open(two.out / "profile" / f"trace-rank-{rank}.json.gz", "rt", encoding="utf-8") as file:
            names = [str(event.get("name")) for event in json.load(file)["traceEvents"]]
        # one step alone: its optimizer is called once
        assert sum(name.startswith("Optimizer.step#") for name in names) == 1
        assert "aten::mm" in (two.out / "profile" / f"table-rank-{rank}.txt").read_text(encoding="utf-8")
    assert "info: traced steps 2 to 2: two/profile/trace-rank-0.json.gz, table-rank-0.txt" in two.stderr.splitlines()
