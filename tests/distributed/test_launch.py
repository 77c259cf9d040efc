"""Joining and leaving a job."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

pytestmark = pytest.mark.distributed


def _twice(rank: int) -> list[float]:
    """Join, leave and join again, as a program does that trains and then scores."""
    from nemo_kto import launch

    totals = []
    dist.destroy_process_group()  # the harness's
    for _ in range(2):
        groups = launch.start(1, 1)
        total = torch.tensor(3.0)
        dist.all_reduce(total, group=groups.dp)
        totals.append(total.item())
        launch.shutdown()
    launch.shutdown()  # leaving twice does nothing
    return totals


def test_a_job_can_be_joined_again_after_leaving_it():
    assert run_ranks(1, _twice) == [[3.0, 3.0]]
