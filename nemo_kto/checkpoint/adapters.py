"""Where the adapters of a run come from: nothing, a checkpoint of a run of ours, or a PEFT directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from torch import nn

from nemo_kto.checkpoint.base_identity import base_identity
from nemo_kto.checkpoint.dist import load_model
from nemo_kto.checkpoint.peft_files import PeftTensors
from nemo_kto.checkpoint.sharded import Part
from nemo_kto.config.adapter_record import AdapterRecord, read_record
from nemo_kto.config.architecture import Architecture
from nemo_kto.config.lora import LoraSpec, lora_spec
from nemo_kto.config.peft_dir import is_peft_directory
from nemo_kto.config.schema import PeftConfig
from nemo_kto.distributed.collectives import raise_together
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.gpt.lora import attach, fill, low_ranks


def starting_spec(peft: PeftConfig, arch: Architecture) -> LoraSpec | None:
    """The adapters of a new run: the config's, with the ranks that those it starts from have; None without adapters.

    Raises:
        CheckpointError: the start cannot be read.
        ConfigError: it has other adapters than the config describes.
    """
    wanted = lora_spec(peft)
    if wanted is None or peft.restore_from_path is None:
        return wanted
    found = adapter_spec(peft.restore_from_path, arch)
    found.check_same(wanted, peft.restore_from_path)
    return found


def adapter_spec(path: str | Path, arch: Architecture) -> LoraSpec:
    """What adapters a checkpoint or a PEFT directory holds.

    Raises:
        CheckpointError: it holds none, or cannot be read.
    """
    return PeftTensors(path, arch).spec() if is_peft_directory(path) else read_record(path).spec


def add_adapters(
    chunks: Sequence[nn.Module], arch: Architecture, path: str | Path, base: str | Path, groups: ParallelGroups
) -> None:
    """Attach the adapters of a checkpoint or a PEFT directory to a network that holds their base's weights.

    Raises:
        CheckpointError: see :func:`load_adapters`.
    """
    spec = adapter_spec(path, arch)
    attach(chunks, spec, groups)
    load_adapters(chunks, arch, path, AdapterRecord(spec, str(base), base_identity(base)), groups)


def load_adapters(
    chunks: Sequence[nn.Module], arch: Architecture, path: str | Path, record: AdapterRecord, groups: ParallelGroups
) -> None:
    """Fill the live adapters, in place. All ranks call it.

    Args:
        chunks: with the adapters that ``record`` describes.
        arch: the network.
        path: a checkpoint of adapters, or a PEFT directory.
        record: of the adapters to fill and the base they sit on.
        groups: the layout, which need not be the saver's.

    Raises:
        CheckpointError: on every rank: it cannot be read, or belongs to another base model. PEFT's directories do not
            tell which weights they belong to.
    """
    if not is_peft_directory(path):
        read_record(path).check_base(record.base, record.base_sha256, path)
        load_model(chunks, path, groups, Part.ADAPTERS)
        return
    error: Exception | None = None
    try:
        tensors = PeftTensors(path, arch)
        for layer, name, adapter in low_ranks(chunks):
            fill(adapter, name, *tensors.matrices(layer, name), groups)
    except Exception as raised:
        error = raised
    raise_together(error, dist.group.WORLD)
