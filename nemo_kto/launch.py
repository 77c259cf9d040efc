"""Starts this process's part of a job: device, default process group, Megatron's groups and random streams."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from nemo_kto import cpu_backend
from nemo_kto.config.world import World, meeting_point, world_from_environment
from nemo_kto.distributed import groups
from nemo_kto.errors import ConfigError

TIMEOUT = timedelta(minutes=30)
"""Longest wait of any collective for a missing peer: one rank may write a large checkpoint while the others wait."""


def start(tensor_parallel: int, pipeline_parallel: int, *, seed: int = 1234) -> groups.ParallelGroups:
    """Join the job alone or under ``torchrun``/``srun``, and lay out the parallel groups.

    Args:
        tensor_parallel: TP size.
        pipeline_parallel: PP size. The rest of the world is data parallel.
        seed: of Megatron's random streams.

    Returns:
        This rank's groups. gloo and CPU without CUDA, NCCL with it.

    Raises:
        ConfigError: the world size is not a multiple of TP x PP.
    """
    on_cpu = cpu_backend.install()
    world = world_from_environment()
    model_size = tensor_parallel * pipeline_parallel
    if world.size % model_size:
        raise ConfigError(
            f"world size {world.size} is not a multiple of tensor_parallel {tensor_parallel} x "
            f"pipeline_parallel {pipeline_parallel} = {model_size}: start a multiple of {model_size} processes"
        )
    device = torch.device("cpu")
    if not on_cpu:
        # a launcher may show each process one device only
        device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _join(world, "gloo" if on_cpu else "nccl")
    laid_out = groups.initialize(tensor_parallel, pipeline_parallel, device, TIMEOUT)
    seed_megatron(seed)
    return laid_out


def seed_megatron(seed: int) -> None:
    """Seed Megatron's random streams. Every rank passes the same seed.

    Megatron offsets it per TP rank by itself; the offset per PP stage, without which all stages would drop the same
    units, is the caller's (its own training script uses the same one).
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    offset = 100 * groups.current(torch.device("cpu")).pp_rank
    torch.manual_seed(seed + offset)
    model_parallel_cuda_manual_seed(seed + offset, force_reset_rng=True)


def shutdown() -> None:
    """Leave the job: the counterpart of :func:`start`."""
    if dist.is_initialized():
        groups.destroy()
        dist.destroy_process_group()


def _join(world: World, backend: str) -> None:
    if world.size > 1 or "MASTER_ADDR" in os.environ:
        address, port = meeting_point()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=1, timeout=TIMEOUT)
