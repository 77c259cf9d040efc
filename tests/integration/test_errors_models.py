"""Weights, checkpoints, archives and meeting points that cannot be used: named once, on any number of ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bad_archives
import bad_checkpoints
import bad_inputs
import bad_session
import psutil
import pytest
import torch
from bad_archives import ARCHIVES
from bad_cases import FILES, LAUNCHER, MODEL, OUT, TP, Bad, check_said, files_of, overrides
from bad_checkpoints import CHECKPOINTS, STEP
from bad_verbs import ALONE, WEIGHTS

pytestmark = pytest.mark.integration

CASES = {**WEIGHTS, **ALONE, **CHECKPOINTS, **ARCHIVES}
WITHIN_S = 30.0
"""How long after the first rank has failed all of them, and everything that they have started, must have ended."""


@pytest.fixture(scope="module")
def here(tmp_path_factory, tiny_llama) -> Path:
    """Bad models, and damaged copies of what good commands have written."""
    here = bad_inputs.make(tmp_path_factory.mktemp("models"), tiny_llama)
    made = bad_session.run(here, {**bad_checkpoints.GOOD, **bad_archives.GOOD}, LAUNCHER)
    assert {name: done.code for name, done in made.items()} == dict.fromkeys(made, 0), made
    bad_checkpoints.damage(here)
    bad_archives.make(here)
    return here


@pytest.fixture(scope="module")
def cases() -> dict[str, Bad]:
    """The table with real ports."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with socket.create_server(("127.0.0.1", 0)) as other:
            ports = {"free": other.getsockname()[1], "taken": taken.getsockname()[1]}

        def filled(bad: Bad) -> Bad:
            environment = {key: value.format(**ports) for key, value in bad.environment.items()}
            return replace(bad, environment=environment, fragments=tuple(f.format(**ports) for f in bad.fragments))

        yield {name: filled(bad) if name in ALONE else bad for name, bad in CASES.items()}


@pytest.fixture(scope="module")
def said(here, cases) -> tuple[dict[str, bad_session.Done], list[str]]:
    """What every command said, and which files it has left or changed."""
    before = files_of(here)
    done = bad_session.run(here, {name: (bad.arguments, bad.environment) for name, bad in cases.items()}, LAUNCHER)
    after = files_of(here)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    return done, sorted(name for name in changed if not name.startswith("session."))


@pytest.mark.parametrize("name", CASES)
def test_an_error_is_said_once(name, said, cases):
    if name == "accelerator" and torch.cuda.is_available():
        pytest.skip("CUDA is there")
    done = said[0][name]
    check_said(cases[name], done.code, done.text)


def test_nothing_else_is_written_or_touched(said, here):
    """A run that cannot go on has left its settings and the loggers' files, and a new directory its reference."""
    logs = ("config.yaml", "hparams.yaml", "events.out", ".lock")
    left = [name for name in said[1] if not Path(name).name.startswith(logs)]
    assert [name for name in left if not name.startswith("out/reference/")] == []
    assert not Path(bad_archives.ABSOLUTE).exists()
    assert not (here.parent / "evil").exists()


# --- two ranks


class Ended:
    """How a command with ranks of its own ended.

    Attributes:
        code: exit code.
        text: standard error.
        took: seconds from the first sign of a rank's failure to the end of the command.
        left: processes that it has started and that are still there.
    """

    def __init__(self, words: list[str], here: Path, scratch: Path, **environment: str) -> None:
        scratch.mkdir()
        env = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
        env |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(scratch), **environment}
        with (scratch / "stderr").open("w+") as stderr, (scratch / "stdout").open("w") as stdout:
            command = [sys.executable, "-m", "nemo_kto.cli.main", "train", *words]
            process = subprocess.Popen(command, cwd=here, env=env, stdout=stdout, stderr=stderr)
            try:
                self._watch(psutil.Process(process.pid), process.poll, scratch)
            finally:
                process.kill()
                self.code = process.wait()
            stderr.seek(0)
            self.text = stderr.read()

    def _watch(self, launcher: psutil.Process, poll: Callable[[], int | None], scratch: Path) -> None:
        seen: dict[psutil.Process, None] = {}
        ranks: list[psutil.Process] = []
        failed, deadline = None, time.monotonic() + 240
        while poll() is None:
            assert time.monotonic() < deadline, "it hangs"
            try:
                seen |= dict.fromkeys(launcher.children(recursive=True))
                ranks = ranks if len(ranks) == 2 else launcher.children()
            except psutil.NoSuchProcess:
                break
            reported = any(scratch.glob("nemo_kto_*/*.json"))
            if failed is None and (reported or not all(map(_is_there, ranks))):
                failed = time.monotonic()
            time.sleep(0.1)
        self.took = time.monotonic() - (failed or time.monotonic())
        _, left = psutil.wait_procs([process for process in seen if _is_there(process)], timeout=5)
        self.left = [process for process in left if _is_there(process)]
        self.ranks = len(ranks)
        for process in self.left:
            process.kill()

    def check(self) -> None:
        """All ranks were there, and ended in time with everything that they had started."""
        assert self.ranks == 2
        assert self.took < WITHIN_S
        assert self.left == []


def _is_there(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _resume(run: str) -> tuple[str, ...]:
    return f"{OUT}={run}", "trainer.kto.max_steps=3", *bad_checkpoints.ARGUMENTS[1:]


RANKS = {
    "cut weights": Bad((f"{MODEL}=cut_weights", f"{TP}=2"), FILES, ("cut_weights/model.safetensors: truncated",)),
    "shape": Bad((f"{MODEL}=turned",), FILES, ("up_proj.weight is [64, 128]", "config.json says [128, 64]")),
    "flipped bit": Bad(_resume("run_flipped_bit"), FILES, CHECKPOINTS["resume: flipped bit"].fragments),
    "lost shard": Bad((*_resume("run_lost_shard"), f"{TP}=2"), FILES, CHECKPOINTS["resume: lost shard"].fragments),
    "other model": replace(
        CHECKPOINTS["resume: other model"], words=(*CHECKPOINTS["resume: other model"].words, f"{TP}=2")
    ),
}
"""Seven commands start ranks in this file, with the two below."""


FAST = ("flipped bit",)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RANKS]
)
def test_two_ranks_say_it_once_and_end(name, here, tmp_path):
    bad = RANKS[name]
    before = {path: found for path, found in files_of(here).items() if f"{STEP}/" in path}
    ended = Ended(overrides("trainer.devices=2", *bad.words), here, tmp_path / "scratch")
    check_said(bad, ended.code, ended.text)
    ended.check()
    assert before.items() <= files_of(here).items(), "no checkpoint is touched"


FAILS_ON_RANK_1 = """
import ctypes, os, pathlib, signal, threading, time
def wait():
    while not pathlib.Path({metrics!r}).exists():
        time.sleep(0.1)
    if {how!r} == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    main_thread = ctypes.c_ulong(threading.main_thread().ident)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main_thread, ctypes.py_object(MemoryError))
if os.environ.get("RANK") == "1":
    threading.Thread(target=wait, daemon=True).start()
"""
"""Found by every Python process through PYTHONPATH: takes one rank down in the middle of training."""


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["killed", pytest.param("raises", marks=pytest.mark.slow)])
def test_a_rank_that_fails_takes_the_others_down(how, here, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(FAILS_ON_RANK_1.format(metrics=str(out / "metrics.jsonl"), how=how))
    words = overrides("trainer.devices=2", "trainer.kto.max_epochs=100000", f"{OUT}={out}")
    ended = Ended(words, here, tmp_path / "scratch", PYTHONPATH=str(tmp_path))
    ended.check()
    assert ended.code == 1, ended.text
    if how == "killed":
        assert ended.text.splitlines()[-1] == f"error: process 1 of 2 was ended by {signal.Signals.SIGKILL.name}"
    else:
        assert "MemoryError" in ended.text
