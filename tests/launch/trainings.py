"""Small trainings that launchers start: their files, their settings, and what they left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trajectory import ADAM, SEQ_LENGTH, make_files

ROOT = Path(__file__).resolve().parent.parent.parent
SLURM, TORCHRUN = ROOT / "examples" / "slurm", ROOT / "examples" / "torchrun"
START_S = 400.0  # until the first step: every rank imports packages for 10 to 20 seconds of a core
RUN_S = 900.0  # until the end
LONG = 100  # steps of a run that is disturbed
CLOCK = ("step_time_s", "tokens_per_second", "peak_memory_bytes", "reference_bytes")
COMPARED = ("loss", "kl", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
_GIVEN = ("pretrained_checkpoint.", "model.data.data_prefix.", "model.data.cache_dir")
_RESUMING = re.compile(r"resuming from \S+, step (\d+)")
_POLL_S = 0.2

SHORT_WORDS = ("model.micro_batch_size=2",)
LONG_WORDS = (
    *("model.micro_batch_size=2", f"trainer.kto.max_steps={LONG}", "trainer.kto.max_epochs=1000"),
    "trainer.kto.save_interval=10",
)


@dataclass(frozen=True)
class Material:
    """Model and data, as :func:`trajectory.make_files` writes them, and room for runs."""

    root: Path

    @staticmethod
    def make(root: Path) -> Material:
        """Write them."""
        return Material(make_files(root))

    def variables(self, results: Path) -> dict[str, str]:
        """What a user edits in the examples."""
        return {
            "MODEL": str(ADAM.folder(self.root) / "policy"),
            "DATA": str(self.root / "train.jsonl"),
            "RESULTS": str(results),
            "SEQ_LENGTH": str(SEQ_LENGTH),
            "LAYOUT": "laptop",
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }

    def words(self, *more: str) -> list[str]:
        """Overrides: the recipe's, but for what the scripts give themselves."""
        keys = {word.split("=")[0] for word in more}
        recipe = [word for word in ADAM.overrides(self.root) if not word.startswith(_GIVEN)]
        return [*(word for word in recipe if word.split("=")[0] not in keys), *more]


def run_script(script: Path, material: Material, results: Path, *words: str, **variables: str) -> None:
    """Run an example on this machine until it ends, which it must with success."""
    env = {**os.environ, **material.variables(results), **variables}
    command = [str(script), *material.words(*words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def lines(results: Path) -> list[dict]:
    """Whole lines of metrics.jsonl, without what the clock says."""
    try:
        text = (results / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in found]


def last_step(results: Path) -> int:
    """The newest step that is written down; 0 before the first."""
    return max((line["step"] for line in lines(results)), default=0)


def deviations(results: Path, wanted: list[dict]) -> list[str]:
    """Where a run leaves the tolerance for another layout (trajectory.py)."""
    kept = [{key: line[key] for key in COMPARED} for line in wanted]
    return ADAM.deviations(lines(results), kept)


def resumed_at(log: str) -> list[int]:
    """The steps from which its starts went on."""
    return [int(step) for step in _RESUMING.findall(log)]


def until(ask: Callable[[], object], timeout: float, failure: Callable[[], str]) -> None:
    """Wait until ``ask`` is true; fails with what ``failure`` says if it is not in time."""
    deadline = time.monotonic() + timeout
    while not ask():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:.0f} s: {failure()}")
        time.sleep(_POLL_S)


def is_training_again(results: Path, log: str, times: int = 1) -> bool:
    """Whether a run has been resumed so often and has done a step since."""
    starts = resumed_at(log)
    return len(starts) >= times and last_step(results) > starts[times - 1]
