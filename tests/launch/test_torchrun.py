"""examples/torchrun on two machines: trainings equal one of a single process, and survive the death of a rank."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trainings
from hosts import Hosts, Machine
from trainings import LONG, LONG_WORDS, RUN_S, SHORT_WORDS, START_S, TORCHRUN, Material

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1800)]

TP2 = "model.tensor_model_parallel_size=2"


@pytest.fixture(scope="module")
def hosts(machine, tmp_path_factory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


class Launched:
    """One script, started on both machines."""

    def __init__(self, hosts: Hosts, script: str, material: Material, results: Path, *words: str, **variables: str):
        self.results, self._log = results, results.with_suffix(".log")
        shared = {**os.environ, **material.variables(results), "HEAD": "kton1", "NODES": "2", **variables}
        self._processes = []
        for number, name in enumerate(Hosts.NAMES):
            with self._log.open("ab") as log:
                own = {"NODE_RANK": str(number)}
                command = [str(TORCHRUN / script), *material.words(*words)]
                self._processes.append(hosts[name].start(*command, env=shared | own, log=log))

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> list[int]:
        """The exit codes."""
        trainings.until(lambda: None not in [p.poll() for p in self._processes], RUN_S, lambda: self.log[-3000:])
        return [process.returncode for process in self._processes]

    def until(self, ask) -> None:
        """Wait for something while it runs."""
        trainings.until(lambda: ask() or self._processes[0].poll() is not None, START_S, lambda: self.log[-3000:])
        assert ask(), self.log[-3000:]

    def rank(self, number: int) -> int:
        """The process of a rank, as this machine numbers it."""
        marks = {f"RESULTS={self.results}".encode(), f"RANK={number}".encode()}
        found = [pid for pid in _processes() if marks <= _environment(pid)]
        (rank,) = [pid for pid in found if _parent(pid) not in found]
        return rank


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _environment(pid: int) -> set[bytes]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.parametrize(
    ("script", "title"), [("multi_node.sh", "static"), ("elastic.sh", "c10d")], ids=["static", "c10d"]
)
def test_two_machines_train_as_one_process_does(script, title, hosts, material, alone, row):
    entry = row(f"torchrun, {title}", 4)
    run = Launched(hosts, script, material, material.root / title, *SHORT_WORDS, TP2, RANKS_PER_NODE="2")
    assert run.end() == [0, 0], run.log
    assert trainings.deviations(run.results, alone) == []
    entry.result, entry.equal = "finished", "within 1e-5 of one process"


def test_a_killed_rank_is_replaced(hosts, material, undisturbed, row):
    """First one on the other machine, then the one that serves the store of all."""
    entry = row("torchrun, c10d, a rank killed twice", 2)
    run = Launched(hosts, "elastic.sh", material, material.root / "elastic", *LONG_WORDS, RANKS_PER_NODE="1")
    for blow, rank in enumerate((1, 0), 1):
        before = max([0, *trainings.resumed_at(run.log)])
        run.until(lambda: trainings.last_step(run.results) >= before + 12)  # noqa: B023 (called at once)
        os.kill(run.rank(rank), signal.SIGKILL)
        began = time.monotonic()
        run.until(lambda: trainings.is_training_again(run.results, run.log, blow))  # noqa: B023
        entry.restart_s = max(entry.restart_s or 0.0, time.monotonic() - began)
    assert run.end() == [0, 0], run.log
    assert len(trainings.resumed_at(run.log)) == 2
    assert trainings.lines(run.results) == undisturbed
    assert undisturbed[-1]["step"] == LONG
    entry.result, entry.equal = "finished", "bit for bit"


def test_machines_reach_each_other_and_nothing_else(hosts):
    def reaches(machine: Machine, address: str) -> bool:
        code = f"import socket; socket.create_connection(({address!r}, 9), timeout=3)"
        done = machine.run("python3", "-c", code, check=False)
        assert done.returncode != 0
        assert "Error" in done.stderr
        return "refused" in done.stderr  # somebody is there

    assert reaches(hosts["kton1"], "kton2")
    assert reaches(hosts["kton2"], "kton1")
    assert not reaches(hosts["kton1"], "192.0.2.1")
    assert hosts["kton1"].run("ip", "route", "show", "default").stdout == ""
