"""Joining and leaving a job."""

from __future__ import annotations

import os
import socket

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


def _timeouts(rank: int, port: int) -> dict[str, list[float]]:
    """Seconds that each process group waits, by the device whose backend it is."""
    from datetime import timedelta

    from nemo_kto import launch
    from nemo_kto.distributed.join import Timeouts

    dist.destroy_process_group()  # the harness's
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    launch.start(2, 1, timeouts=Timeouts(timedelta(minutes=2), timedelta(seconds=450)))
    found: dict[str, list[float]] = {}
    for group in dist.distributed_c10d._world.pg_map:
        for device in group._device_types:
            waits = group._get_backend(device).options._timeout
            found.setdefault(str(device), []).append(waits.total_seconds())
    launch.shutdown()
    return found


def test_no_group_waits_longer_than_it_is_told():
    """Megatron's gloo groups included: those of this rank are its data-parallel ones, of one rank each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for found in run_ranks(2, _timeouts, port):
        assert len(found["cpu"]) > 10, "Megatron's groups are missing"
        assert {wait for waits in found.values() for wait in waits} == {450.0}


def test_a_job_can_be_joined_again_after_leaving_it():
    assert run_ranks(1, _twice) == [[3.0, 3.0]]
