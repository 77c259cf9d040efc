"""Process groups of the parallel layout. The only file that reads or initialises Megatron's ``parallel_state``.

Everything else receives a :class:`ParallelGroups` (or one group out of it) as an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ParallelGroups:
    """The groups this rank belongs to, and where it stands in them.

    Axes: ``tp`` shards matrices and the vocabulary, ``pp`` shards layers, ``dp`` replicates the model and shards the
    batch. World rank order is Megatron's default, tp fastest, then dp, then pp.
    """

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    model: dist.ProcessGroup
    """The ranks of this rank's model replica: TP x PP, all at the same place on the data-parallel axis."""
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    last_stage_rank: int
    """World rank of the last pipeline stage of this rank's pipeline: the source of everything the loss knows."""
    speaker_rank: int
    """World rank of the first tensor-parallel rank of the last stage of this replica: it reads and writes for it."""
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the final norm and the LM head; log-probs and losses exist only here."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_speaker(self) -> bool:
        """Whether this rank reads and writes for its replica: one of its ranks does."""
        return self.is_last_stage and self.tp_rank == 0

    @property
    def model_rank(self) -> int:
        """Index of this rank's model slice, in [0, tp_size * pp_size)."""
        return self.pp_rank * self.tp_size + self.tp_rank


def initialize(
    tensor_parallel: int, pipeline_parallel: int, device: torch.device, timeout: timedelta = timedelta(minutes=30)
) -> ParallelGroups:
    """Build Megatron's groups over the default process group, which must exist, and return this rank's view.

    Calling it again with the same sizes returns the same layout; other sizes rebuild every group.
    """
    from megatron.core import parallel_state as ps

    wanted = (tensor_parallel, pipeline_parallel)
    if ps.model_parallel_is_initialized():
        if (ps.get_tensor_model_parallel_world_size(), ps.get_pipeline_model_parallel_world_size()) == wanted:
            return current(device)
        ps.destroy_model_parallel()
    ps.initialize_model_parallel(
        tensor_parallel,
        pipeline_parallel,
        distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
    )
    # Megatron rounds to minutes, and forgets one of its groups (the gloo one of expert data parallelism)
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)
    return current(device)


def destroy() -> None:
    """Forget Megatron's groups, before the default process group that they are part of goes."""
    from megatron.core import parallel_state as ps

    if ps.model_parallel_is_initialized():
        ps.destroy_model_parallel()


def current(device: torch.device) -> ParallelGroups:
    """This rank's groups as Megatron holds them now."""
    from megatron.core import parallel_state as ps

    model = ps.get_model_parallel_group()
    tp_size = ps.get_tensor_model_parallel_world_size()
    return ParallelGroups(
        tp=ps.get_tensor_model_parallel_group(),
        pp=ps.get_pipeline_model_parallel_group(),
        dp=ps.get_data_parallel_group(),
        model=model,
        tp_rank=ps.get_tensor_model_parallel_rank(),
        tp_size=tp_size,
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        pp_size=ps.get_pipeline_model_parallel_world_size(),
        dp_rank=ps.get_data_parallel_rank(),
        dp_size=ps.get_data_parallel_world_size(),
        last_stage_rank=ps.get_pipeline_model_parallel_last_rank(),
        speaker_rank=sorted(dist.get_process_group_ranks(model))[-tp_size],  # stages follow one another in the world
        device=device,
    )
