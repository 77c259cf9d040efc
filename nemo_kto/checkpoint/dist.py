"""Megatron distributed checkpoints: sharded weights and optimizer state, readable at any layout. Knows no name map.

A checkpoint directory holds Megatron's ``torch_dist`` files; ``hf/``, the config and tokenizer of the Hugging Face
model it came from, so that it can be read, resumed and exported without that model; and a manifest of checksums.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from nemo_kto.checkpoint.metadata import check_metadata
from nemo_kto.checkpoint.saving import ESSENTIAL, CheckpointWriter, Contents
from nemo_kto.checkpoint.sharded import Part, sharded_state, take_over, tensor_keys
from nemo_kto.checkpoint.together import on_all_ranks
from nemo_kto.config import manifest
from nemo_kto.config.adapter_record import holds_adapters
from nemo_kto.config.locate import is_megatron_checkpoint
from nemo_kto.distributed.collectives import raise_together
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.errors import CheckpointError


def save_model(
    chunks: Sequence[nn.Module], hf_source_dir: str | Path, out_dir: str | Path, groups: ParallelGroups
) -> None:
    """Write the weights alone. Every rank calls it; ``out_dir`` must be on a file system that all ranks share.

    Raises:
        CheckpointError: on every rank: ``out_dir`` exists or cannot be written.
    """
    CheckpointWriter().save(chunks, Contents(Path(hf_source_dir)), out_dir, groups)


def load_model(
    chunks: Sequence[nn.Module], ckpt_dir: str | Path, groups: ParallelGroups, part: Part = Part.NETWORK
) -> None:
    """Read the weights alone, at this layout, into the live parameters.

    Raises:
        CheckpointError: not a checkpoint, damaged, or its tensors do not fit this model.
    """
    damage = damages(ckpt_dir) if (Path(ckpt_dir) / manifest.MANIFEST).is_file() else []
    if damage:
        raise CheckpointError(f"{ckpt_dir} is damaged: {damage[0]}")
    load(chunks, None, ckpt_dir, groups, part)


def load(
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None,
    ckpt_dir: str | Path,
    groups: ParallelGroups,
    part: Part = Part.NETWORK,
) -> dict[str, Any]:
    """Read weights, and optimizer state where an optimizer is given, in place. The layout may differ from the saver's.

    Nothing is unpickled but what an allow-list names: see :mod:`nemo_kto.checkpoint.metadata`.

    Returns:
        The saver's ``common``.

    Raises:
        CheckpointError: not a checkpoint, or its tensors do not fit this model.
    """
    path = Path(ckpt_dir)
    raise_together(_unfit(path, part), dist.group.WORLD)
    template = sharded_state(chunks, optimizer, groups, part=part, is_loading=True)

    def fill() -> dict[str, Any]:
        check_metadata(path, tensor_keys(template))
        state = dist_checkpointing.load(template, str(path))
        take_over(chunks, state, part)
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
        common: dict[str, Any] = state.get("common", {})
        return common

    saver = "another model" if optimizer is None else "another model or model.optim.name"
    return on_all_ranks(fill, f"{path} is damaged, or was saved by {saver}")


def damages(folder: str | Path) -> list[str]:
    """What is wrong with a checkpoint's files, by its manifest; empty where nothing is.

    All ranks call it and share the reading; every rank gets the whole answer.
    """
    path = Path(folder)
    mine = manifest.problems(path, part=dist.get_rank(), parts=dist.get_world_size()) or _lacking(path)
    everyone: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return list(dict.fromkeys(line for lines in everyone for line in lines))


def _unfit(path: Path, part: Part) -> CheckpointError | None:
    if not is_megatron_checkpoint(path):
        return CheckpointError(f"{path} is not a Megatron distributed checkpoint: it holds no metadata.json")
    if part is Part.NETWORK and holds_adapters(path):
        return CheckpointError(
            f"{path} holds adapters alone: give their base model here, and them as model.peft.restore_from_path or "
            "--adapter"
        )
    if part is Part.ADAPTERS and not holds_adapters(path):
        return CheckpointError(f"{path} holds no adapters but a whole model: it was saved with peft_scheme none")
    return None


def _lacking(folder: Path) -> list[str]:
    """What a manifest does not know of although no checkpoint can be without it."""
    known = manifest.read(folder)
    return [f"{folder} lacks {name}" for name in ESSENTIAL if name not in known]
