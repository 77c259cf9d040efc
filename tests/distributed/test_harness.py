"""The spawn helper itself: results by rank, the first failure's traceback, no hang."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from harness import RankError, run_ranks

pytestmark = pytest.mark.distributed


def _sum(rank: int, value: float) -> tuple[int, torch.Tensor, str]:
    total = torch.tensor(value * rank)
    dist.all_reduce(total)
    return rank, total, os.environ["OMP_NUM_THREADS"]


def _raise_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def _hang_on_one(rank: int) -> None:
    if rank == 1:
        time.sleep(600)
    dist.barrier()


def test_results_come_back_by_rank():
    results = run_ranks(3, _sum, 2.0)
    assert [(rank, total.item(), threads) for rank, total, threads in results] == [(r, 6.0, "1") for r in range(3)]
    assert "WORLD_SIZE" not in os.environ


def test_a_raising_rank_is_named_and_takes_the_others_down():
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 raised(.|\n)*rank one is unwell"):
        run_ranks(2, _raise_on_one, timeout=100)
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_a_hang_ends_with_the_stack_it_hung_in():
    with pytest.raises(RankError, match=r"did not end within 30 s(.|\n)*_hang_on_one"):
        run_ranks(2, _hang_on_one, timeout=30)
