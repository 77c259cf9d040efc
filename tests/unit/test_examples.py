"""The batch scripts of examples/slurm: what two files share is the same text in both."""

from __future__ import annotations

from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parent.parent.parent / "examples" / "slurm"
MARK = "# ---- from here on as in "


def test_both_training_scripts_decide_alike_whether_to_run_again():
    tails = [(SLURM / name).read_text().split(MARK)[1].split("\n", 1)[1] for name in ("kto.sbatch", "kto_srun.sbatch")]
    assert tails[0] == tails[1]
    assert "scontrol requeue" in tails[0]


@pytest.mark.parametrize("name", ["kto.sbatch", "kto_srun.sbatch", "prepare.sbatch"])
def test_three_lines_are_to_be_edited(name):
    lines = (SLURM / name).read_text().splitlines()
    edited = [line.split("=")[0] for line in lines if "/path/to" in line]
    assert edited == ["MODEL", "DATA", "RESULTS"]
    first = lines.index(next(line for line in lines if line.startswith("MODEL=")))
    assert all(line.startswith("#") or not line for line in lines[:first])  # Slurm reads its options up to a command
