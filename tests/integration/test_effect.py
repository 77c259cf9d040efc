"""A real model learns what the labels say, and the opposite from flipped labels. Slow: six trainings of SmolLM2.

Bounds are those a TRL twin clears with room (AUC 0.78 and 0.80 on two draws, 0.26 flipped; margins 0.38, 0.50, -0.57):
they tell a working objective from a broken one, not a good seed from a bad one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.effect, pytest.mark.integration, pytest.mark.timeout(7200)]

LORA = ("model.peft.peft_scheme=lora", "model.optim.lr=2e-4")  # as the demo has it
ASSETS = Path(__file__).resolve().parents[2] / "demo_out" / "smollm2" / "assets"


@pytest.fixture(scope="module")
def assets() -> Path:
    """The demo's model and data, fetched if no demo has run here."""
    script = Path(__file__).resolve().parents[2] / "examples" / "demo" / "assets.py"
    subprocess.run([sys.executable, str(script), str(ASSETS)], check=True, timeout=1800)
    return ASSETS


def _train_and_score(assets: Path, out: Path, train_file: str, words: tuple[str, ...]) -> dict[str, float]:
    run = [sys.executable, "-m", "nemo_kto.cli.main"]
    overrides = [
        *("demo=smollm2", f"exp_manager.explicit_log_dir={out / 'run'}", *words),
        *(f"pretrained_checkpoint.restore_from_path={assets / 'model'}", "trainer.kto.limit_val_batches=0"),
        f"model.data.data_prefix.train=[{assets / train_file}]",
        f"model.data.data_prefix.validation=[{assets / 'heldout.jsonl'}]",
    ]
    environment = {**os.environ, "NEMO_KTO_CACHE": str(out / "cache")}
    environment.pop("OMP_NUM_THREADS", None)  # one process: it may use every core
    subprocess.run([*run, "train", *overrides], check=True, timeout=3600, env=environment)
    newest = (out / "run" / "latest_checkpoint.txt").read_text(encoding="utf-8").strip()
    files = ["--data", str(assets / "heldout.jsonl"), "--out", str(out / "scores.jsonl")]
    files += ["--summary-json", str(out / "scores.json"), "--seq-length", "128"]
    base = str(assets / "model")
    models = ["--model", base, "--adapter", newest] if words == LORA else ["--model", newest, "--reference", base]
    subprocess.run([*run, "score", *models, *files], check=True, timeout=3600, env=environment)
    summary: dict[str, float] = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    return summary


@pytest.mark.parametrize("words", [("loss=kto",), ("loss=kto_paper",), LORA], ids=["kto", "kto_paper", "lora"])
def test_sixty_steps_learn_the_labels_and_flipped_ones_the_opposite(
    assets: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    learnt = _train_and_score(assets, tmp_path / "labels", "train.jsonl", words)
    assert learnt["auc"] > 0.70
    assert learnt["margin"] > 0.25
    flipped = _train_and_score(assets, tmp_path / "flipped", "train_flipped.jsonl", words)
    assert flipped["auc"] < 0.40
    assert flipped["margin"] < 0
