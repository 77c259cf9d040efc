"""Runs one function on several ranks over gloo and brings back what each rank returned. Knows nothing of Megatron.

Example, in a test module (the function must stand at module level, so that a spawned process can import it)::

    def _case(rank: int, value: float) -> float:
        total = torch.tensor(value * rank)
        dist.all_reduce(total)
        return total.item()

    @pytest.mark.distributed
    def test_sum():
        assert run_ranks(2, _case, 3.0) == [3.0, 3.0]
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
GRACE_S = 2.0
"""How long the other ranks get to report their own error once one rank has failed."""


class RankError(AssertionError):
    """A rank raised, died or did not end in time. The message carries its traceback."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``fn(rank, *args)`` in ``world_size`` spawned processes that share a gloo default group.

    Starting a rank costs seconds (it imports torch), so let one ``fn`` run many cases.

    Args:
        world_size: number of ranks; 1 is allowed.
        fn: picklable by name. May build its own groups, and may destroy the default one.
        *args: picklable, the same for all ranks.
        timeout: seconds until every rank is killed and the stacks it hung in are reported.

    Returns:
        What each rank returned, by rank (saved with torch.save, so tensors and containers of them are fine).

    Raises:
        RankError: with the traceback of the rank that failed first; the others are taken down.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name, _environment(world_size):
        folder = Path(name)
        context = mp.get_context("spawn")
        deadline = time.time() + timeout  # of the wall clock, which processes share
        ranks = [
            context.Process(target=_rank_main, args=(rank, world_size, folder, deadline, fn, args))
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            in_time = _await(ranks, time.monotonic() + deadline - time.time())
        finally:
            _take_down(ranks)
        if not in_time or any(process.exitcode != 0 for process in ranks):
            raise RankError(_report(ranks, folder, in_time, timeout))
        return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(world_size)]


class Worlds:
    """Worlds of ranks, each spawned when it is first asked for, and only then; one that failed fails again.

    Args:
        fn: called as ``fn(rank, world_size, *args)``.
        *args: picklable.
        timeout: as of :func:`run_ranks`.
    """

    def __init__(self, fn: Callable[..., Any], *args: Any, timeout: float) -> None:
        self._fn, self._args, self._timeout = fn, args, timeout
        self._outcomes: dict[int, list[Any] | RankError] = {}

    def __call__(self, world_size: int) -> list[Any]:
        """What each rank returned, by rank.

        Raises:
            RankError: as :func:`run_ranks`.
        """
        if world_size not in self._outcomes:
            try:
                self._outcomes[world_size] = run_ranks(
                    world_size, self._fn, world_size, *self._args, timeout=self._timeout
                )
            except RankError as error:
                self._outcomes[world_size] = error
        outcome = self._outcomes[world_size]
        if isinstance(outcome, RankError):
            raise outcome
        return outcome


def _rank_main(
    rank: int, world_size: int, folder: Path, deadline: float, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    stacks = (folder / f"{rank}.stacks").open("w")
    left = max(5.0, deadline - time.time())  # starting this process has taken some of the time
    faulthandler.dump_traceback_later(left - 3.0, file=stacks)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",  # a port could be taken between choosing and binding it
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=left),
        )
        torch.save(fn(rank, *args), folder / f"{rank}.result")
        if dist.is_initialized():
            dist.barrier()  # leaving early would cut the connections of a rank that is still receiving
            dist.destroy_process_group()
    except BaseException:
        # One rename, so that the parent never reads half a traceback; its time stamp tells who failed first.
        draft = folder / f"{rank}.draft"
        draft.write_text(traceback.format_exc())
        draft.rename(folder / f"{rank}.error")
        raise SystemExit(1) from None


def _await(ranks: list[BaseProcess], deadline: float) -> bool:
    """Wait for all ranks, or for a short while after the first failure; False if the deadline passed."""
    alive = {process.sentinel: process for process in ranks}
    failed = False
    while alive:
        done = wait(list(alive), timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            return failed
        for sentinel in done:
            process = alive.pop(sentinel)  # type: ignore[call-overload]
            process.join()
            if process.exitcode != 0 and not failed:
                failed = True
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return True


def _take_down(ranks: list[BaseProcess]) -> None:
    started = [process for process in ranks if process.pid is not None]
    for process in started:
        if process.is_alive():
            process.kill()
    for process in started:
        process.join()


def _report(ranks: list[BaseProcess], folder: Path, in_time: bool, timeout: float) -> str:
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    lines = [] if in_time else [f"ranks did not end within {timeout:g} s; what they were doing:"]
    lines += [f"exit codes by rank: {[process.exitcode for process in ranks]}"]
    lines += [f"--- rank {path.stem} raised:\n{path.read_text()}" for path in errors]
    if not in_time:
        stacks = sorted(folder.glob("*.stacks"))
        lines += [f"--- rank {path.stem} hung in:\n{path.read_text()}" for path in stacks]
    return "\n".join(lines)


@contextlib.contextmanager
def _environment(world_size: int) -> Iterator[None]:
    """Children read their thread counts at import, so the variables must stand before they start."""
    wanted = {**SINGLE_THREAD, "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
