"""Runs ranks that join a job, or cannot: torch is imported once, and every rank of every case is a fork of it.

A case maps a rank to ``[act, environment]``. Reads the cases from a file and writes, for each rank, its exit code,
seconds and standard error to another.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_kto import interrupts, peers
from nemo_kto.config.world import world_from_environment
from nemo_kto.distributed.join import Timeouts, join
from nemo_kto.errors import KTOError

JOIN_S = 4.0


def _joined() -> None:
    late = float(os.environ.get("LATE", 0))
    time.sleep(late)
    join(world_from_environment(), "gloo", Timeouts(timedelta(seconds=JOIN_S), timedelta(minutes=1)))


def _sum() -> None:
    """Join, exchange, leave, twice."""
    for _ in range(2):
        _joined()
        total = torch.tensor(float(dist.get_rank() + 1))
        dist.all_reduce(total)
        assert total.item() == sum(range(1, dist.get_world_size() + 1))
        dist.barrier()
        peers.leave()
        dist.destroy_process_group()


def _told() -> None:
    """Be asked to stop while waiting."""
    interrupts.listen()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    _joined()


def _fail() -> None:
    """Join, and fail without closing a connection, as a rank does whose others wait in NCCL."""
    _joined()
    peers.tell_others("a shard is missing")
    time.sleep(25)


def _die() -> None:
    _joined()
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _wait() -> None:
    """Join, and wait for something that never comes, without reading any connection of a peer."""
    interrupts.listen()
    _joined()
    time.sleep(60)


def _receive() -> None:
    _joined()
    dist.broadcast(torch.zeros(1), src=1)


ACTS = {act.__name__[1:]: act for act in (_joined, _sum, _told, _fail, _die, _wait, _receive)}


def _rank(act: str, environment: dict[str, str], said: Path) -> int:
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(environment)
    try:
        ACTS[act]()
    except KTOError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except RuntimeError as error:
        if not peers.is_loss(error):
            raise
        sys.stderr.write(f"error: {peers.lost_contact(error)}\n")
        return 1
    return 0


def _start(act: str, environment: dict[str, str], said: Path) -> int:
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = _rank(act, environment, said)
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def main(cases_file: str, results_file: str) -> None:
    """Run all cases at once: their ranks mostly wait."""
    cases = json.loads(Path(cases_file).read_text())
    folder = Path(tempfile.mkdtemp(dir=Path(results_file).parent))
    children = {}
    began = time.monotonic()
    for case, ranks in cases.items():
        for rank, (act, environment) in ranks.items():
            children[_start(act, environment, folder / f"{case}.{rank}")] = (case, rank)
    results: dict[str, dict[str, list[object]]] = {case: {} for case in cases}
    while children:
        child, status = os.wait()
        case, rank = children.pop(child)
        text = (folder / f"{case}.{rank}").read_text()
        results[case][rank] = [os.waitstatus_to_exitcode(status), time.monotonic() - began, text]
    Path(results_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
