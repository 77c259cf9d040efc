"""Records that give no finite loss: their steps are skipped, and a run of nothing else ends, resumable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from command_line import read_metrics
from train_runs import BATCH, CLOCK, Run, train

pytestmark = pytest.mark.integration

BAD = "\u00a7"
"""The model's embedding of this character is NaN."""
BAD_STEPS = (2, 4, 6, 7)
STEPS = 10
WORDS = (
    *("model.data.shuffle=false", "trainer.kto.max_epochs=1", "trainer.kto.limit_val_batches=0"),
    *("trainer.kto.save_interval=2", "model.optim.sched.warmup_steps=5"),
)

AHEAD = ("model.kto.reference_lookahead=3",)
"""Bad batches lie at the beginning, in the middle and at the end of windows."""


def poison(model: Path) -> None:
    """Make the embedding of :data:`BAD` NaN."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    weights = load_file(model / "model.safetensors")
    ids = AutoTokenizer.from_pretrained(model)(BAD)["input_ids"]
    weights["model.embed_tokens.weight"][ids[-1]] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def batches(folder: Path) -> list[list[str]]:
    lines = tiny.make_records(folder / "all.jsonl", STEPS * BATCH).read_text().splitlines()
    return [lines[i : i + BATCH] for i in range(0, len(lines), BATCH)]


def spoil(line: str) -> str:
    record = json.loads(line)
    return json.dumps({**record, "prompt": record["prompt"] + BAD})


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_llama) -> Path:
    root = tmp_path_factory.mktemp("skipped_cli")
    shutil.copytree(tiny_llama, root / "model")
    poison(root / "model")
    (root / "heldout.jsonl").write_text(tiny.make_records(root / "some.jsonl", 2).read_text())
    steps = batches(root)
    good = [batch for step, batch in enumerate(steps, 1) if step not in BAD_STEPS]
    for step in BAD_STEPS:
        steps[step - 1][2] = spoil(steps[step - 1][2])
    lines = [line for batch in steps for line in batch]
    (root / "train.jsonl").write_text("\n" + "".join(f"{line}\n" for line in lines))  # its first line is blank
    (root / "good.jsonl").write_text("".join(f"{line}\n" for batch in good for line in batch))
    return root


def places(step: int) -> list[str]:
    """Where the records of a step stand."""
    first = (step - 1) * BATCH + 2
    return [f"train.jsonl:{line}" for line in range(first, first + BATCH)]


def skipped(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.out / "skipped.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stopped(root) -> tuple[Run, list[int], list[dict]]:
    """Two bad batches in a row end it; its checkpoints and lines then."""
    run = train(root, "run", *WORDS, *AHEAD, "trainer.kto.max_consecutive_skips=2", code=4)
    return run, run.checkpoints, run.training


@pytest.fixture(scope="module")
def again(stopped, root) -> tuple[Run, list[dict]]:
    """The same command once more."""
    run = train(root, "run", *WORDS, "trainer.kto.max_consecutive_skips=2", code=4)
    return run, skipped(run)


@pytest.fixture(scope="module")
def finished(again, root) -> Run:
    return train(root, "run", *WORDS, *AHEAD, "trainer.kto.max_consecutive_skips=3")


def _says_why(run: Run) -> None:
    error = run.stderr.splitlines()[-1]
    assert error.startswith("error: 2 steps in a row were skipped (trainer.kto.max_consecutive_skips), the last of ")
    assert f"step 7: the loss is nan. Its records: {', '.join(places(7))}; run/skipped.jsonl names those of" in error
    assert run.stderr.count("error: ") == 1
    assert "Traceback" not in run.stderr


def test_a_skipped_step_is_counted_and_the_next_is_trained(stopped):
    run, checkpoints, lines = stopped
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 2, 2, 3, 4]
    assert [line["consumed_samples"] for line in lines] == [BATCH * step for step in range(1, 8)]
    for line in lines:
        bad = line["step"] in BAD_STEPS
        assert (line["loss"] is None, line["kl"] is None, line["grad_norm"] is None) == (bad, bad, bad)
    assert checkpoints == [3, 5], "due at 2 and 4, and saved with the next step that is taken"
    assert [line for line in run.stderr.splitlines() if "skipped" in line][:-1] == [
        f"warning: step {step} is skipped: the loss is nan; run/skipped.jsonl names its records" for step in BAD_STEPS
    ]
    _says_why(run)


@pytest.mark.slow
def test_a_resumed_run_knows_how_many_it_has_skipped(again):
    run, lines = again
    assert [line["step"] for line in run.training] == list(range(1, 8))
    assert run.stderr.count("is skipped") == 2
    _says_why(run)
    assert [(line["step"], line["records"]) for line in lines] == [(step, places(step)) for step in BAD_STEPS]


@pytest.mark.slow
def test_with_patience_it_goes_on_as_if_the_bad_batches_had_never_been(finished, root):
    taken = [line for line in finished.training if line["step"] not in BAD_STEPS]
    assert [line["skipped_steps"] for line in finished.training][-3:] == [4, 4, 4]
    assert [line["step"] for line in taken] == [1, 3, 5, 8, 9, 10]
    without = train(root, "without", *WORDS, "model.data.data_prefix.train=[good.jsonl]")
    position = ("step", "epoch", "consumed_samples", "skipped_steps", *CLOCK)
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in position} for line in lines] for lines in (taken, without.training)
    )
    assert ours == theirs, "bit for bit: loss, kl, rewards, norm and learning rate"
    assert len({line["lr"] for line in taken}) == 6


@pytest.mark.slow
def test_several_processes_end_with_one_message(root):
    bad = [spoil(line) for batch in batches(root)[:2] for line in batch]
    (root / "bad.jsonl").write_text("".join(f"{line}\n" for line in bad))
    words = ("trainer.devices=2", "model.data.data_prefix.train=[bad.jsonl]", "model.optim.sched.warmup_steps=1")
    run = train(root, "two", *WORDS[:-1], *words, "trainer.kto.max_consecutive_skips=2", code=4)
    assert run.stderr.count("error: ") == 1
    assert "bad.jsonl:5, bad.jsonl:6, bad.jsonl:7, bad.jsonl:8; " in run.stderr
    assert len(read_metrics(run.out / "metrics.jsonl")) == 2
    assert run.checkpoints == []
