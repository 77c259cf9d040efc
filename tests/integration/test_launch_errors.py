"""Launches that go wrong: one message from the culprit, no hang, and no process left, for real trainings."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest
import tiny
from live_runs import BY_TORCHRUN, LiveRun, send, training_lines

pytestmark = [pytest.mark.integration, pytest.mark.distributed]

CONFIG, DATA, STOPPED = 2, 3, 4
TAKEN_DOWN_S = 30.0
"""From the culprit's end to that of all others (issue 4)."""
PER_RANK = "model.data.data_prefix.train=['train${oc.env:RANK,}.jsonl']"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """``train.jsonl`` and ``train0.jsonl`` are the same; ``train1.jsonl`` has no label in its second line."""
    root = tmp_path_factory.mktemp("launches")
    tiny.make_model(root / "model", num_hidden_layers=2)
    tiny.make_records(root / "train.jsonl", 22, seed=1)
    text = (root / "train.jsonl").read_text()
    (root / "train0.jsonl").write_text(text)
    lines = text.splitlines(keepends=True)
    (root / "train1.jsonl").write_text(lines[0] + '{"prompt": "p", "response": "r"}\n' + "".join(lines[2:]))
    return root


def _training(run: LiveRun) -> bool:
    return len(training_lines(run.out)) > 1


def test_a_missing_rank_is_named(root):
    """One task of two, as when a node does not come up."""
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    words = ("trainer.devices=null", "trainer.join_timeout_minutes=0.05")
    with LiveRun(root, "alone", *words, environment=alone) as run:
        assert run.end(120) == CONFIG, run.log
    assert len(run.errors) == 1
    assert run.errors[0].startswith("error: rank 1 of 2 did not join within 3 s: their own logs say why")
    assert "Traceback" not in run.log


def test_an_address_of_another_machine_is_named(root):
    """MASTER_ADDR of the node of some other rank: rank 0 is to listen itself."""
    other = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "198.51.100.77", "MASTER_PORT": "29578"}
    words = ("trainer.devices=null", "trainer.join_timeout_minutes=0.02")
    with LiveRun(root, "elsewhere", *words, environment=other) as run:
        assert run.end(120) == CONFIG, run.log
    assert len(run.errors) == 1, run.log
    assert run.errors[0].startswith("error: MASTER_ADDR=198.51.100.77 does not lead to this machine, ")
    for noise in ("frame #", "[c10d]", "Traceback"):
        assert noise not in run.log, run.log


@pytest.mark.parametrize("launcher", ["own", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_fault_of_one_rank_ends_the_others(launcher, root):
    """Rank 1's data is bad. Rank 0 has joined, and waits for it."""
    command = {"command": BY_TORCHRUN} if launcher == "torchrun" else {}
    words = () if launcher == "own" else ("trainer.devices=null",)
    with LiveRun(root, f"fault_{launcher}", PER_RANK, *words, **command) as run:
        run.until(lambda: len(run.ranks) == 2)
        pid = run.ranks[1]
        run.until(lambda: pid not in run.processes)
        began = time.monotonic()
        code = run.end(TAKEN_DOWN_S)
        assert time.monotonic() - began < TAKEN_DOWN_S
    assert code == (1 if launcher == "torchrun" else DATA), run.log
    others = ("error: stopped by SIGTERM before all ranks had joined", "error: rank 1 failed: the data cannot be used")
    told = [line for line in run.errors if line.startswith(others)]
    assert len(told) <= (1 if launcher == "torchrun" else 0), run.log  # torchrun lets both speak
    assert [line for line in run.errors if line not in told] == ["error: the data cannot be used; problems (1):"]
    assert "train1.jsonl:2" in run.log


@pytest.mark.slow
def test_a_rank_that_dies_is_one_line_at_the_others(root):
    with LiveRun(root, "died", command=BY_TORCHRUN) as run:
        run.until(lambda: _training(run))
        send(run.ranks[1], signal.SIGKILL)
        assert run.end(TAKEN_DOWN_S) == 1, run.log
    assert run.log.count("Traceback (most recent call last)") == 1, run.log  # torchrun's own
    assert len(run.errors) == 1, run.log
    assert re.fullmatch(
        r"error: lost contact with another rank \([^()]*Connection (closed|reset) by peer[^()]*\): its own log says "
        r"why; a training goes on from its newest checkpoint with the same command",
        run.errors[0],
    )


@pytest.mark.slow
def test_a_killed_training_leaves_no_process(root):
    """Alone, after its first save: Megatron's checkpoint writers have a manager by then, and data has workers."""
    words = (
        "trainer.devices=1",
        "trainer.kto.save_interval=2",
        "exp_manager.checkpoint_callback_params.async_save=true",
    )
    with LiveRun(root, "killed", *words) as run:
        run.until(lambda: bool(run.checkpoints))
        assert len(run.processes) > 2, "nothing to leave behind"
        send(run.process.pid, signal.SIGKILL)
        run.process.wait()
        run.gone(10)


@pytest.mark.slow
def test_ranks_whose_launcher_was_killed_save_and_end(root):
    with LiveRun(root, "orphans") as run:
        run.until(lambda: _training(run))
        send(run.process.pid, signal.SIGKILL)
        run.process.wait()
        run.gone(TAKEN_DOWN_S)
    assert run.checkpoints == [run.last_step], run.log


@pytest.mark.slow
def test_a_signal_before_the_first_step_is_not_lost(root):
    """It may come while packages are imported; the ranks heed it as soon as they can stop together."""
    with LiveRun(root, "early") as run:
        run.until(lambda: len(run.ranks) == 2)
        for pid in run.ranks:
            send(pid, signal.SIGTERM)
        assert run.end(120) == STOPPED, run.log
    assert len(run.errors) == 1
    assert run.errors[0].startswith("error: stopped by SIGTERM "), run.log
    assert training_lines(run.out) == []


@pytest.mark.slow
def test_a_directory_is_one_runs(root):
    """The second is refused, and the first goes on as if nobody had come."""
    words = ("trainer.kto.max_steps=100000", "trainer.kto.max_epochs=100000", "trainer.kto.save_interval=50000")
    with LiveRun(root, "shared", *words) as run:
        run.until(lambda: _training(run))
        with LiveRun(root, "shared", *words) as second:
            assert second.end(120) == CONFIG, second.log
        assert len(second.errors) == 1
        assert re.match(r"error: \S+=shared is in use by another run \(process \d+ on \S+\): let it", second.errors[0])
        done = run.last_step
        run.until(lambda: run.last_step > done)
        send(run.process.pid, signal.SIGTERM)
        assert run.end(120) == STOPPED, run.log
    assert run.checkpoints[-1] == run.last_step
    assert [line["step"] for line in training_lines(run.out)] == list(range(1, run.last_step + 1))


@pytest.mark.slow
def test_a_killed_data_worker_is_one_message(root):
    """As where memory runs out."""
    with LiveRun(root, "worker", "trainer.devices=1", "model.data.num_workers=1") as run:
        run.until(lambda: _training(run))
        send(max(pid for pid in run.processes if b"forkserver" in _command(pid)), signal.SIGKILL)
        assert run.end(60) == 1, run.log
    assert len(run.errors) == 1, run.log
    assert "error: a process that builds batches died (DataLoader worker (pid" in run.log
    assert "lower model.data.num_workers (now 1; 0 builds them in the training process)" in run.log
    assert "Traceback" not in run.log


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
