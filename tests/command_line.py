"""``nemo-kto train`` in a process of its own, as a user starts it, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

INTEGERS = (
    *("step", "consumed_samples", "num_desirable", "num_undesirable", "kl_pairs", "tokens", "peak_memory_bytes"),
    *("skipped_steps", "reference_bytes", "reference_rows_computed"),
)
MEANS = (
    "kl",
    *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
    *(f"logps/{name}" for name in ("chosen", "rejected")),
)
CACHED = {"reference_rows_computed", "val/reference_rows_computed"}
"""Keys that lines of runs with ``model.kto.reference=cache`` have besides."""
TRAINING = {
    *INTEGERS,
    *MEANS,
    "epoch",
    "loss",
    "grad_norm",
    "lr",
    "step_time_s",
    "pad_fraction",
    "tokens_per_second",
} - CACHED
"""Keys of a training step's line (design, section 4, "Output")."""
VALIDATED = {"loss", *MEANS, "num_desirable", "num_undesirable", "kl_pairs"}
VALIDATION = {"step", "epoch", "consumed_samples", *(f"val/{name}" for name in VALIDATED)}
"""Keys of a validation's line: the means and counts under ``val/``, and where in the training it took place."""
NULLABLE = {name for name in MEANS if name.startswith(("rewards/", "logps/"))} - {"rewards/accuracies"}
"""Means over one class, which may have no row, and the margin between both."""
NOT_FINITE = {"loss", "kl", "grad_norm"}
"""What may be null, too, in the line of a step that was skipped because of it."""


@dataclass(frozen=True)
class Run:
    """What a finished training printed and wrote."""

    stdout: str
    stderr: str
    training: list[dict]
    validation: list[dict]


def train(overrides: list[str], out: Path) -> Run:
    """Train into ``out``. Each process computes on one thread: this machine's few cores are shared."""
    command = [sys.executable, "-m", "nemo_kto.cli.main", "train", *overrides, f"exp_manager.explicit_log_dir={out}"]
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in launcher} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    lines = read_metrics(out / "metrics.jsonl")
    validation = [line for line in lines if "val/loss" in line]
    return Run(done.stdout, done.stderr, [line for line in lines if line not in validation], validation)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file, each with exactly the promised keys, of the promised types, without NaN."""
    text = path.read_text(encoding="utf-8")
    lines = [json.loads(line, parse_constant=_refuse) for line in text.splitlines()]
    skipped = 0
    for line in lines:
        skipped, before = line.get("skipped_steps", skipped), skipped
        nullable = NULLABLE | (NOT_FINITE if skipped > before else set())
        assert set(line) - CACHED == (VALIDATION if "val/loss" in line else TRAINING)
        for key, value in line.items():
            name = key.removeprefix("val/")
            if value is None:
                assert name in nullable, key
            else:
                assert isinstance(value, int if name in INTEGERS else float), (key, value)
    return lines


def _refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} in metrics.jsonl: not JSON")
