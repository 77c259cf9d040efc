"""Weights and checkpoints that cannot be used: named once, with the promised exit code, and left as they are."""

from __future__ import annotations

from pathlib import Path

import bad_checkpoints
import bad_inputs
import bad_session
import pytest
import torch
from bad_cases import LAUNCHER, check_said, files_of
from bad_checkpoints import CHECKPOINTS
from bad_verbs import ALONE, WEIGHTS

pytestmark = pytest.mark.integration

CASES = {**WEIGHTS, **ALONE, **CHECKPOINTS}


@pytest.fixture(scope="module")
def here(tmp_path_factory, tiny_llama) -> Path:
    """Bad models, and damaged copies of what good commands have written."""
    here = bad_inputs.make(tmp_path_factory.mktemp("models"), tiny_llama)
    made = bad_session.run(here, bad_checkpoints.GOOD, LAUNCHER)
    assert {name: done.code for name, done in made.items()} == dict.fromkeys(made, 0), made
    bad_checkpoints.damage(here)
    return here


@pytest.fixture(scope="module")
def said(here) -> tuple[dict[str, bad_session.Done], list[str]]:
    """What every command said, and which files it has left or changed."""
    before = files_of(here)
    done = bad_session.run(here, {name: (bad.arguments, bad.environment) for name, bad in CASES.items()}, LAUNCHER)
    after = files_of(here)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    return done, sorted(name for name in changed if not name.startswith("session."))


@pytest.mark.parametrize("name", CASES)
def test_an_error_is_said_once(name, said):
    if name == "accelerator" and torch.cuda.is_available():
        pytest.skip("CUDA is there")
    done = said[0][name]
    check_said(CASES[name], done.code, done.text)


def test_no_checkpoint_is_written_or_touched(said):
    """A run that cannot go on has left its settings and the loggers' files, and a new directory its reference."""
    logs = ("config.yaml", "hparams.yaml", "events.out")
    left = [name for name in said[1] if not Path(name).name.startswith(logs)]
    assert [name for name in left if not name.startswith("out/reference/")] == []
