"""Live Megatron parameters to a ``.nemo`` archive: a distributed checkpoint, NeMo's config, config and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from nemo_kto.checkpoint import nemo_config
from nemo_kto.checkpoint.nemo_archive import pack
from nemo_kto.checkpoint.nemo_model import WEIGHTS
from nemo_kto.checkpoint.saving import CheckpointWriter, Contents
from nemo_kto.checkpoint.together import on_first_rank
from nemo_kto.config.architecture import Architecture
from nemo_kto.config.locate import HF_SUBDIR
from nemo_kto.config.manifest import MANIFEST
from nemo_kto.distributed.groups import ParallelGroups


def save_nemo(
    chunks: Sequence[nn.Module], arch: Architecture, hf_source: Path, out: Path, groups: ParallelGroups
) -> None:
    """Write an archive that any layout reads. Every rank calls it.

    The weights are written sharded beside ``out`` first, so that it takes twice their size on the disk for a while.

    Args:
        chunks: model chunks of this rank, bare or wrapped.
        arch: the network.
        hf_source: directory with the config and tokenizer that go along.
        out: the archive; replaced if it exists, on a file system that all ranks share.
        groups: the layout.

    Raises:
        CheckpointError: on every rank: it cannot be written. ``out`` is as before.
    """
    draft = out.with_name(f".{out.name}.contents")
    on_first_rank(partial(shutil.rmtree, draft, ignore_errors=True), f"{draft} cannot be removed")
    dtype = next(parameter.dtype for chunk in chunks for parameter in chunk.parameters())
    try:
        CheckpointWriter().save(chunks, Contents(hf_source), draft / WEIGHTS, groups)
        on_first_rank(partial(_pack, draft, arch, dtype, groups.tp_size, out), f"{out} cannot be written")
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)


def _pack(draft: Path, arch: Architecture, dtype: torch.dtype, tensor_parallel: int, out: Path) -> None:
    weights, hf = draft / WEIGHTS, draft / HF_SUBDIR
    (weights / HF_SUBDIR).rename(hf)
    (weights / MANIFEST).unlink()  # the archive has its own
    name = str(dtype).removeprefix("torch.")
    config = json.loads((hf / "config.json").read_text(encoding="utf-8"))
    config |= {"torch_dtype": name, "dtype": name}
    (hf / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    precision = "bf16" if dtype is torch.bfloat16 else "32"
    text = nemo_config.to_yaml(arch, precision=precision, tensor_parallel=tensor_parallel)
    (draft / nemo_config.FILE).write_text(text, encoding="utf-8")
    pack(draft, out)
