"""Two ranks that are told to stop, in every way a scheduler does: saved at a step boundary, resumed exactly.

One run is stopped again and again and each time resumed by the next start; at its end it equals one that was not.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from live_runs import BY_TORCHRUN, STEPS, LiveRun, send, training_lines
from train_runs import PLAIN

pytestmark = [pytest.mark.integration, pytest.mark.distributed, pytest.mark.slow]

STOPPED = 4
TERM, USR1 = signal.SIGTERM, signal.SIGUSR1


def _to_parent(run: LiveRun) -> None:
    for number in (TERM, USR1, TERM):
        send(run.process.pid, number)


def _to_agent(run: LiveRun) -> None:
    """torchrun passes SIGTERM on; SIGUSR1 it does not handle, and dies of it."""
    send(run.process.pid, TERM)


def _to_one_rank(run: LiveRun) -> None:
    send(run.ranks[1], USR1)


def _to_all_ranks(run: LiveRun) -> None:
    for number in (TERM, USR1):
        for pid in run.ranks:
            send(pid, number)


def _to_every_process(run: LiveRun) -> None:
    """As Slurm does at the end of a step: the data workers have it too."""
    for pid in run.processes:
        send(pid, TERM)


def _nothing(_: LiveRun) -> None:
    """Time is up by itself."""


STOPS: dict[str, tuple[Callable[[LiveRun], None], tuple[str, ...], tuple[str, ...], str]] = {
    # how, what starts it, overrides, the reason that is given (of two signals at once, either may be seen first)
    "the parent, again and again": (_to_parent, PLAIN, (), "(SIGTERM|SIGUSR1)"),
    "one rank": (_to_one_rank, PLAIN, (), "SIGUSR1"),
    "all ranks, twice": (_to_all_ranks, PLAIN, (), "(SIGTERM|SIGUSR1)"),
    "every process": (
        _to_every_process,
        PLAIN,
        ("exp_manager.checkpoint_callback_params.async_save=true",),
        "SIGTERM",
    ),
    "torchrun's agent": (_to_agent, BY_TORCHRUN, (), "SIGTERM"),
    "time": (_nothing, PLAIN, ("exp_manager.max_time_per_run=00:00:00:03",), "exp_manager.max_time_per_run"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("preemption")
    tiny.make_model(root / "model", num_hidden_layers=2)
    tiny.make_records(root / "train.jsonl", 22, seed=1)
    return root


@pytest.fixture(scope="module")
def whole(root) -> list[dict]:
    """The steps of a run that nobody stops."""
    with LiveRun(root, "whole") as run:
        assert run.end(300) == 0, run.log
    return training_lines(run.out)


@pytest.fixture(scope="module")
def stopped(root) -> dict[str, tuple[int, int, LiveRun, list[dict]]]:
    """For each stop: exit code, newest checkpoint, the run, and all steps so far. One directory for all of them."""
    found = {}
    for name, (stop, command, words, _) in STOPS.items():
        before = len(training_lines(root / "run"))
        with LiveRun(root, "run", *words, command=command) as run:
            run.until(lambda: len(training_lines(run.out)) > before + 1)  # noqa: B023 (called at once)
            stop(run)
            code = run.end()
        found[name] = (code, run.checkpoints[-1] if run.checkpoints else 0, run, training_lines(run.out))
    return found


@pytest.mark.parametrize("name", STOPS)
def test_it_ends_saved_at_a_step_boundary_with_one_message(name, stopped):
    code, saved, run, lines = stopped[name]
    _, command, _, reason = STOPS[name]
    assert code == (1 if command == BY_TORCHRUN else STOPPED), run.log  # torchrun has no other code for a failure
    assert saved == lines[-1]["step"] < STEPS, run.log
    said = f"stopped by {reason} after step {saved} of {STEPS}; the same command goes on from there"
    assert len(run.errors) == (2 if command == BY_TORCHRUN else 1), run.log
    assert all(re.fullmatch(f"error: {said}", error) for error in run.errors), run.log
    assert "stopped by" not in re.sub(said, "", run.log)
    # torchrun shows its own end, be it by the signal
    assert run.log.count("Traceback (most recent call last)") <= (1 if command == BY_TORCHRUN else 0), run.log


def test_the_resumed_run_equals_the_uninterrupted_one(stopped, whole, root):
    before = list(stopped.values())[-1][3]
    assert len(stopped) == len(STOPS)
    assert before == whole[: len(before)]
    with LiveRun(root, "run") as run:
        assert run.end(300) == 0, run.log
    assert training_lines(run.out) == whole
    assert [line["step"] for line in whole] == list(range(1, STEPS + 1))
