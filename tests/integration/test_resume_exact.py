"""A run that goes on from any of its checkpoints ends as if it had never been interrupted, bit for bit.

Shuffled, read by two workers, dropout on, validation in between, over the ends of epochs, with and without looking
ahead; every metric of every step, and at the end every byte of weights, optimizer state and random streams.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
from train_runs import CLOCK

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).with_name("resume_at_each_step.py")
STEPS = 9
ROWS, BATCH = 13, 4  # 3 steps per epoch, and one row left over
WORDS = [
    "pretrained_checkpoint.restore_from_path=model",
    "model.data.data_prefix.train=[train.jsonl]",
    "model.data.data_prefix.validation=[heldout.jsonl]",
    *("model.data.cache_dir=cache", "model.data.seq_length=64", "model.data.num_workers=2"),
    *(f"model.global_batch_size={BATCH}", "model.micro_batch_size=2", "trainer.kto.max_epochs=3"),
    *("model.hidden_dropout=0.1", "model.attention_dropout=0.1", "model.optim.lr=1e-3"),
    *("model.optim.sched.warmup_steps=2", "trainer.kto.val_check_interval=2", "trainer.kto.save_interval=1"),
    "exp_manager.checkpoint_callback_params.save_top_k=-1",
]
RUNS = {
    "fp32": ("4,1:4,3:1,4:3,6:4", ["trainer.precision=32"]),
    "bf16 async": ("1,5:1", ["trainer.precision=bf16", "exp_manager.checkpoint_callback_params.async_save=true"]),
    "tp2": ("3,4:3", ["trainer.precision=32", "trainer.devices=2", "model.tensor_model_parallel_size=2"]),
    "dp2": ("2,7:2", ["trainer.precision=32", "trainer.devices=2"]),
}
"""How many global batches one swap serves; steps to resume at, and how many it serves from there; what the run is.

Most of these steps lie in the middle of a window, and some runs go on with windows of another size."""

ALWAYS = "fp32"


def _run(root: Path, name: str) -> Path:
    steps, words = RUNS[name]
    out = root / name.replace(" ", "-")
    out.mkdir()
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    command = [sys.executable, str(SCRIPT), str(out), steps, *WORDS, *words]
    env |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory, wanted):
    root = tmp_path_factory.mktemp("resume")
    tiny.make_model(root / "model", num_hidden_layers=2)
    tiny.make_records(root / "train.jsonl", ROWS, seed=1)
    tiny.make_records(root / "heldout.jsonl", 6, seed=2)
    with ThreadPoolExecutor(2) as pool:
        jobs = {name: pool.submit(_run, root, name) for name in {ALWAYS, *wanted("name")}}
        return {name: job.result() for name, job in jobs.items()}


def _lines(out: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def _state(out: Path) -> dict[str, object]:
    """Checksums of everything that training changes."""
    files = json.loads((out / "checkpoints" / f"step-{STEPS:06d}" / "manifest.json").read_text())["files"]
    return {name: record for name, record in files.items() if name.endswith((".distcp", ".safetensors"))}


RESUMED = [(name, other.split(":")[0]) for name in RUNS for other in RUNS[name][0].split(",")[1:]]


@pytest.mark.parametrize(
    ("name", "step"), [pytest.param(*case, marks=() if case[0] == ALWAYS else pytest.mark.slow) for case in RESUMED]
)
def test_every_metric_and_every_byte_is_the_same(name, step, runs):
    whole, resumed = runs[name] / "whole", runs[name] / f"from-{step}"
    assert [line["step"] for line in _lines(whole) if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in _lines(whole) if "val/loss" in line] == [2, 4, 6, 8]
    assert _lines(resumed) == _lines(whole)
    assert len(_state(whole)) >= 2
    assert _state(resumed) == _state(whole)


def test_dropout_was_on(runs):
    """Its streams move: two checkpoints of one run hold different ones."""
    records = []
    for step in (1, 2):
        manifest = runs[ALWAYS] / "whole" / "checkpoints" / f"step-{step:06d}" / "manifest.json"
        records.append(json.loads(manifest.read_text())["files"]["random.safetensors"]["sha256"])
    assert records[0] != records[1]
