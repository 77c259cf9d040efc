"""Run by test_resume_exact.py in one process, since importing NeMo costs seconds: one run, then from many steps.

Usage: resume_at_each_step.py DIRECTORY A,K:B,... OVERRIDE...   The run, which looks A global batches ahead, goes to
DIRECTORY/whole, and what goes on from its checkpoint of step K, looking B ahead, to DIRECTORY/from-K.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def train(out: Path, words: list[str]) -> None:
    from nemo_kto.cli.main import main

    code = main(["train", *words, f"exp_manager.explicit_log_dir={out}"])
    assert code == 0, code


def resume(whole: Path, step: int, words: list[str]) -> None:
    """Take the run back to where it was when ``step`` had been saved, and start it again."""
    out = whole.with_name(f"from-{step}")
    shutil.copytree(whole, out)
    for checkpoint in (out / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    train(out, words)


if __name__ == "__main__":
    root, (first, *others), overrides = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    lookahead = "model.kto.reference_lookahead"
    train(root / "whole", [*overrides, f"{lookahead}={first}"])
    for step, ahead in (other.split(":") for other in others):
        resume(root / "whole", int(step), [*overrides, f"{lookahead}={ahead}"])
