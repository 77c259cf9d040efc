"""examples/torchrun over loopback: what stops on purpose is not started again, and a port in use is said."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import tiny
from live_runs import LiveRun, send, training_lines

pytestmark = [pytest.mark.integration, pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "torchrun"
STOP_S = 400.0
"""For a step and a checkpoint; then an agent may wait 300 seconds for another that was signalled and has gone."""
LONG = ("trainer.devices=null", "trainer.kto.max_steps=100000", "trainer.kto.max_epochs=100000")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("elastic")
    tiny.make_model(root / "model", num_hidden_layers=2)
    tiny.make_records(root / "train.jsonl", 22, seed=1)
    return root


@contextmanager
def _job(root: Path, out: str, *words: str) -> Iterator[list[LiveRun]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    own = {"HEAD": "127.0.0.1", "NODES": "2", "RANKS_PER_NODE": "1", "LAYOUT": "laptop", "PORT": port, "RUN_ID": out}
    files = {"MODEL": "model", "DATA": "train.jsonl", "RESULTS": out, "TMPDIR": str(root)}
    env = {**own, **files, "PYTHON": sys.executable, "SAVE_SECONDS": "60"}
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                LiveRun(root, out, *LONG, *words, command=(str(SCRIPTS / "elastic.sh"),), environment=env)
            )
            for _ in range(2)
        ]


def _stopped_once(agents: list[LiveRun], why: str) -> None:
    assert [agent.end(STOP_S) for agent in agents] == [4, 4], [agent.log for agent in agents]
    log = "\n".join(agent.log for agent in agents)
    assert log.count("world 2 = 2 nodes x 1") == 1, log
    assert f"error: stopped by {why} after step " in log
    assert agents[0].checkpoints == [agents[0].last_step]


def test_its_time_is_up(root):
    with _job(root, "time", "exp_manager.max_time_per_run=00:00:00:10") as agents:
        _stopped_once(agents, "exp_manager.max_time_per_run")
    assert not list(root.glob("tmp.*")), "notes are left"


@pytest.mark.parametrize("signalled", [[0], [1], [0, 1]], ids=["the first", "the second", "both"])
def test_a_signal(signalled, root):
    """An agent that is alone with it: its rank tells the other rank, and they save together."""
    with _job(root, f"signal_{''.join(map(str, signalled))}") as agents:
        agents[0].until(lambda: len(training_lines(agents[0].out)) > 1)
        for number in signalled:
            send(agents[number].process.pid, signal.SIGTERM)
        _stopped_once(agents, "SIGTERM")


@pytest.mark.parametrize("script", ["elastic.sh", "multi_node.sh"])
def test_a_port_in_use_is_an_error(script):
    """By something that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        given = {"HEAD": "127.0.0.1", "NODES": "2", "NODE_RANK": "0", "PORT": str(port), "PYTHON": sys.executable}
        env = {**os.environ, **given, "MODEL": "model", "DATA": "train.jsonl", "RESULTS": "out"}
        done = subprocess.run([SCRIPTS / script], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: PORT={port} is in use on 127.0.0.1")
    assert len(done.stderr.splitlines()) == 1
