"""Two torchrun agents, as on two nodes, over loopback: a rank that dies or fails takes the whole job down, soon.

Each agent's output ends with the reason, whichever node one looks at.
"""

from __future__ import annotations

import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import tiny
from live_runs import LiveRun, send, training_lines

pytestmark = [pytest.mark.integration, pytest.mark.distributed, pytest.mark.slow]

ENDED_S = 60.0
"""From a rank's end to that of everything else (issue 7)."""
IMPORT_S = 60.0
"""Of NeMo, which a rank does before it joins; where many processes share few cores it takes so long."""
RUN = (sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1")
PER_RANK = "model.data.data_prefix.train=['train${oc.env:RANK,}.jsonl']"
LAUNCHERS = ("static", "c10d")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """``train1.jsonl`` has no label in its second line; the others are well."""
    root = tmp_path_factory.mktemp("nodes")
    tiny.make_model(root / "model", num_hidden_layers=2)
    tiny.make_records(root / "train.jsonl", 22, seed=1)
    lines = (root / "train.jsonl").read_text().splitlines(keepends=True)
    (root / "train0.jsonl").write_text("".join(lines))
    (root / "train1.jsonl").write_text(lines[0] + '{"prompt": "p", "response": "r"}\n' + "".join(lines[2:]))
    return root


@contextmanager
def _job(root: Path, out: str, launcher: str, *words: str) -> Iterator[list[LiveRun]]:
    """Both agents, the one with rank 0 first: under c10d the agents settle that between themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ExitStack() as stack:
        agents = []
        for node in range(2):
            how = (f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}")
            if launcher == "c10d":
                how = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={out}")
            command = (*RUN, *how, "-m", "nemo_kto.cli.main", "train")
            agents.append(stack.enter_context(LiveRun(root, out, "trainer.devices=null", *words, command=command)))
        agents[0].until(lambda: all(agent.ranks for agent in agents))
        numbers = [agent.rank_numbers[0] for agent in agents]
        yield [agents[numbers.index(0)], agents[numbers.index(1)]]


def _both_end(agents: list[LiveRun], began: float, seconds: float = ENDED_S) -> None:
    codes = [agent.end(seconds) for agent in agents]
    assert time.monotonic() - began < seconds, [agent.log for agent in agents]
    assert codes == [1, 1]


def _root_cause(log: str) -> str:
    """What torchrun gives as the reason, with which its output ends."""
    return log.rpartition("Root Cause (first observed failure):")[2]


def _training(agents: list[LiveRun]) -> None:
    agents[0].until(lambda: len(training_lines(agents[0].out)) > 1)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_is_killed(launcher, root):
    with _job(root, f"killed_{launcher}", launcher) as agents:
        _training(agents)
        began = time.monotonic()
        send(agents[1].ranks[0], signal.SIGKILL)
        _both_end(agents, began)
    first, second = (agent.log for agent in agents)
    assert "Signal 9 (SIGKILL) received" in _root_cause(second)
    assert re.search(r"lost contact with another rank \([^()]*Connection (closed|reset) by peer", _root_cause(first))
    assert "world 2 = 2 nodes x 1 (torchrun), TP 1 x PP 1 x DP 2; ranks 0-1 " in first


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_fails_in_the_middle(launcher, root):
    """The process that builds rank 1's batches is killed, as where memory runs out; rank 1 says so."""
    with _job(root, f"failed_{launcher}", launcher, "model.data.num_workers=1") as agents:
        _training(agents)
        began = time.monotonic()
        send(max(pid for pid in agents[1].processes if b"forkserver" in _command(pid)), signal.SIGKILL)
        _both_end(agents, began)
    said = "a process that builds batches died (DataLoader worker (pid"
    first, second = (" ".join(_root_cause(agent.log).split()) for agent in agents)
    assert said in second
    assert f"rank 1 failed: {said}" in first
    assert "this rank lost contact with it" in first


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_fails_before_it_joins(launcher, root):
    """Its data is bad. The other has been waiting for it, or comes later."""
    with _job(root, f"bad_{launcher}", launcher, PER_RANK) as agents:
        agents[1].until(lambda: bool(agents[1].errors))
        agents[0].until(lambda: "tokenised: 22 rows" in agents[0].log)
        _both_end(agents, time.monotonic(), IMPORT_S + ENDED_S)
    first, second = (" ".join(_root_cause(agent.log).split()) for agent in agents)
    assert "train1.jsonl:2" in second
    assert re.search(r"rank 1 failed: .*train1\.jsonl:2.*this rank was waiting for it to join", first)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
