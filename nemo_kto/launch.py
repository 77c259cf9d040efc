"""Starts this process's part of a job: device, default process group, Megatron's groups and random streams."""

from __future__ import annotations

import os
import random

import numpy as np
import torch
import torch.distributed as dist

from nemo_kto import cpu_backend, peers
from nemo_kto.config.network import GLOO_INTERFACE, NCCL_INTERFACE
from nemo_kto.config.world import World, world_from_environment
from nemo_kto.distributed import groups
from nemo_kto.distributed.join import DEFAULT_TIMEOUTS, Timeouts, join, seats
from nemo_kto.errors import ConfigError


def start(
    tensor_parallel: int, pipeline_parallel: int, *, seed: int = 1234, timeouts: Timeouts = DEFAULT_TIMEOUTS
) -> groups.ParallelGroups:
    """Join the job alone or under ``torchrun``/``srun``, and lay out the parallel groups.

    Args:
        tensor_parallel: TP size.
        pipeline_parallel: PP size. The rest of the world is data parallel.
        seed: of Megatron's random streams.
        timeouts: how long to wait for the other ranks.

    Returns:
        This rank's groups. gloo and CPU without CUDA, NCCL with it.

    Raises:
        ConfigError: the world size is not a multiple of TP x PP, or ranks are missing.
    """
    cpu_backend.install()
    world = world_from_environment()
    model_size = tensor_parallel * pipeline_parallel
    if world.size % model_size:
        raise ConfigError(
            f"world size {world.size} is not a multiple of tensor_parallel {tensor_parallel} x "
            f"pipeline_parallel {pipeline_parallel} = {model_size}: start a multiple of {model_size} processes"
        )
    device = enter(world, timeouts)
    laid_out = groups.initialize(tensor_parallel, pipeline_parallel, device, timeouts.collective)
    seed_megatron(seed)
    return laid_out


def enter(world: World, timeouts: Timeouts) -> torch.device:
    """Take this rank's device and join the job: gloo and CPU without CUDA, NCCL with it.

    Raises:
        ConfigError: ranks are missing, or cannot meet.
    """
    on_cpu = cpu_backend.install()
    device = torch.device("cpu")
    if not on_cpu:
        # a launcher may show each process one device only
        device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    join(world, "gloo" if on_cpu else "nccl", timeouts)
    return device


def hosts() -> list[str]:
    """The host of each rank, on rank 0 of a job that has been joined."""
    return [seat.host for seat in seats()]


def channel() -> str:
    """How the ranks talk: backend, and interface or interfaces, for people to read. On rank 0."""
    backend = dist.get_backend()
    if dist.get_world_size() == 1:
        return f"{backend}, no network"
    names = sorted({seat.interface for seat in seats()} - {""})
    if not names:
        return f"{backend}, which chooses its interface"
    variable = GLOO_INTERFACE if backend == "gloo" else NCCL_INTERFACE
    return f"{backend} over {', '.join(names)}" + (f" ({variable})" if os.environ.get(variable) else "")


def seed_megatron(seed: int) -> None:
    """Seed Megatron's random streams, and those of torch, numpy and Python. Every rank passes the same seed.

    Megatron offsets it per TP rank by itself; the offset per PP stage, without which all stages would drop the same
    units, is the caller's (its own training script uses the same one).
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    offset = 100 * groups.current(torch.device("cpu")).pp_rank
    random.seed(seed + offset)  # these two go into checkpoints, which are otherwise the same for the same seed
    np.random.seed(seed + offset)
    torch.manual_seed(seed + offset)
    model_parallel_cuda_manual_seed(seed + offset, force_reset_rng=True)


def shutdown() -> None:
    """Leave the job, together: the counterpart of :func:`start`. All ranks call it."""
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            dist.barrier()  # rank 0 may serve the store, and so goes last
        peers.leave()
        groups.destroy()
        dist.destroy_process_group()
