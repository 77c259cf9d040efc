"""Feedback of one kind only: trained on, with a warning, and without a NaN anywhere."""

from __future__ import annotations

from pathlib import Path

import command_line
import pytest
from trajectory import ADAM, make_files, records, write_records

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("single_class"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "absent"), [("chosen", "rejected"), pytest.param("rejected", "chosen", marks=pytest.mark.slow)]
)
def test_training_on_one_class(label: str, absent: str, root: Path) -> None:
    write_records(root / "train.jsonl", [[prompt, response, label] for prompt, response, _ in records()])
    run = command_line.train(
        [
            *ADAM.overrides(root),
            f"model.data.data_prefix.validation=[{root / 'train.jsonl'}]",
            "model.micro_batch_size=4",
            "trainer.kto.max_steps=4",
            "trainer.kto.val_check_interval=2",
            "trainer.kto.save_interval=2",
        ],
        root / label,
    )
    word = {"chosen": "desirable", "rejected": "undesirable"}
    assert f"warning: the data holds no {word[absent]} row" in run.stderr
    assert len(run.training) == 4
    assert len(run.validation) == 2
    for line in (*run.training, *run.validation):
        prefix = "val/" if "val/loss" in line else ""
        nulls = {key for key, value in line.items() if value is None}
        assert nulls == {f"{prefix}{key}" for key in (f"rewards/{absent}", f"logps/{absent}", "rewards/margins")}
        assert line[f"{prefix}num_{word[absent]}"] == 0
        assert line[f"{prefix}loss"] > 0
    # it learns: praise of everything raises rewards, blame lowers them; the same rows validate it
    first, last = (line[f"val/rewards/{label}"] for line in run.validation)
    assert (last > first) == (label == "chosen")
