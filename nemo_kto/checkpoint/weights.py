"""Weights from whatever kind of model directory a path is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from torch import nn

from nemo_kto.checkpoint.dist import load_model
from nemo_kto.checkpoint.hf_load import load_hf
from nemo_kto.config.architecture import Architecture
from nemo_kto.config.locate import is_megatron_checkpoint
from nemo_kto.distributed.collectives import raise_together
from nemo_kto.distributed.groups import ParallelGroups


def load_weights(chunks: Sequence[nn.Module], arch: Architecture, path: str | Path, groups: ParallelGroups) -> None:
    """Fill the live parameters in place from a Hugging Face directory or a Megatron checkpoint.

    A ``.nemo`` file is unpacked before: :func:`nemo_kto.checkpoint.nemo_model.model_directory`.

    Raises:
        CheckpointError: a tensor or file is missing, unexpected, of the wrong shape, or unreadable.
    """
    if is_megatron_checkpoint(path):
        load_model(chunks, path, groups)
        return
    error: Exception | None = None
    try:
        load_hf(chunks, arch, path, groups)
    except Exception as raised:
        error = raised
    raise_together(error, dist.group.WORLD)  # a slice may be bad on one rank alone
