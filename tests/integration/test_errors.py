"""Whatever is wrong, the command line says so once, naming the culprit and the fix, with the promised exit code."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import bad_inputs
import pytest
from bad_cases import CONFIG, LAUNCHER, PP, TP, TRAINING, check_said, files_of, overrides
from bad_verbs import VERBS

from nemo_kto.cli.main import main

pytestmark = pytest.mark.integration

CASES = {**TRAINING, **VERBS}


@pytest.fixture(scope="module")
def here(tmp_path_factory, tiny_llama) -> Path:
    """A folder with a good model and good data, and everything that can be wrong with either."""
    return bad_inputs.make(tmp_path_factory.mktemp("errors"), tiny_llama)


@pytest.fixture
def command_line(here, monkeypatch, capsys):
    """Run ``nemo-kto`` in this process: exit code and standard error. Puts back what it sets."""
    monkeypatch.chdir(here)
    before, logger = dict(os.environ), logging.getLogger("nemo_kto")
    state = (logger.handlers[:], logger.propagate, logger.level)
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)

    def run(words: list[str]) -> tuple[int, str]:
        capsys.readouterr()
        try:
            code = main(words)
        except SystemExit as usage:
            code = usage.code
        return code, capsys.readouterr().err

    yield run
    os.environ.clear()
    os.environ.update(before)
    logger.handlers, logger.propagate = state[0], state[1]
    logger.setLevel(state[2])


@pytest.mark.parametrize("bad", CASES.values(), ids=CASES)
def test_an_error_is_said_once_and_leaves_nothing(bad, command_line, here, monkeypatch):
    for key, value in bad.environment.items():
        monkeypatch.setenv(key, value)
    before = files_of(here)
    code, text = command_line(bad.arguments)
    check_said(bad, code, text)
    assert files_of(here) == before
    assert not any((here / "out").glob("**/*")), "the output directory must be left clean"


def test_there_are_enough_of_them():
    assert len(CASES) >= 60


def test_several_mistakes_are_said_together(command_line):
    code, text = command_line(["train", *overrides("model.optim.lr=0", "model.kto.kl_clamp=x", "trainer.precision=8")])
    assert code == CONFIG
    assert [key in text for key in ("model.optim.lr=0.0", "model.kto.kl_clamp=x", "trainer.precision=8")] == [True] * 3


# --- in a process of their own


def _process(words: list[str], here: Path, *python: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHER} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(python or ("-m", "nemo_kto.cli.main")), "train", *overrides(*words)]
    return subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=200, check=False)


def test_nothing_heavy_is_imported_for_a_config_error(here):
    code = (
        "import sys\nfrom nemo_kto.cli.main import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'torch', 'nemo', 'megatron', 'lightning', 'transformers'}\n"
        "print(*sorted(heavy & {m.split('.')[0] for m in sys.modules}))\nsys.exit(code)"
    )
    done = _process(["model.micro_batch_size=3"], here, "-c", code)
    assert (done.returncode, done.stdout.strip()) == (CONFIG, "")
    assert done.stderr.startswith("error: model.global_batch_size 4 is not a multiple of")


def test_a_world_of_the_wrong_size_is_said_before_it_starts(here):
    done = _process(["trainer.devices=2", f"{TP}=4"], here)
    assert (done.returncode, done.stdout) == (CONFIG, "")
    said = (
        f"error: world size 2 is not a multiple of {TP} 4 x {PP} 1 = 4: start a multiple of 4 processes, or make "
        "TP x PP one of 1, 2 (world 2 = 1 node x 2)"
    )
    assert done.stderr.splitlines() == [said]
