"""No file of a checkpoint is able to run code."""

from __future__ import annotations

import hostile_cases as cases
import pytest
import tiny
import training_kit as kit
from harness import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    tiny.make_model(root / "model", **kit.SIZES)
    return run_ranks(1, cases.hostile, root, timeout=200)[0]


@pytest.mark.parametrize("whole", [False, True], ids=["weights", "run"])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_nothing_runs(kind, whole, found):
    error, text, ran = found[f"{kind} {whole}"]
    assert not ran
    assert error == "CheckpointError", text
