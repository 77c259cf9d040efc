"""Hugging Face weights into live Megatron parameters, each rank reading only its own slice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nemo_kto.checkpoint import hf_names
from nemo_kto.checkpoint.hf_files import HFTensors
from nemo_kto.checkpoint.hf_names import Rule
from nemo_kto.config.architecture import Architecture
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.errors import CheckpointError
from nemo_kto.gpt.network import unwrap

_HARMLESS = (".rotary_emb.inv_freq",)  # buffers that old exporters stored; the config says the same


def load_hf(chunks: Sequence[torch.nn.Module], arch: Architecture, hf_dir: str | Path, groups: ParallelGroups) -> int:
    """Load a Hugging Face directory into the model, in place, with no collective.

    Everything that headers can tell is checked on every rank before the first parameter changes. Values are cast to
    the parameters' dtype. Both copies of a tied embedding are filled when pipeline stages hold one each.

    Args:
        chunks: from ``build_gpt``, bare or wrapped.
        arch: the network.
        hf_dir: ``model.safetensors``, or several files with their index.
        groups: the layout of ``chunks``.

    Returns:
        Bytes of tensor data this rank read.

    Raises:
        CheckpointError: files are missing or corrupt, or tensors are missing, unexpected or of the wrong shape. The
            message names tensor and file.
    """
    with HFTensors(hf_dir) as stored:
        _validate(stored, arch, Path(hf_dir))
        for chunk in chunks:
            for name, parameter in unwrap(chunk).global_parameters():
                rule = hf_names.rule_for(arch, name)
                if rule.names == (hf_names.EMBEDDING,) and arch.tied_embeddings:
                    _check_tied_head(stored, rule, groups)
                _fill(parameter, rule, arch, stored, groups)
        return stored.bytes_read


def _fill(
    parameter: torch.nn.Parameter, rule: Rule, arch: Architecture, stored: HFTensors, groups: ParallelGroups
) -> None:
    parts = [
        stored.read(name, hf_names.shard_bounds(rule, index, groups.tp_rank, groups.tp_size))
        for index, name in enumerate(rule.names)
    ]
    with torch.no_grad():
        parameter.copy_(hf_names.join(rule, arch, parts, rows=parameter.shape[0]))


def _validate(stored: HFTensors, arch: Architecture, hf_dir: Path) -> None:
    wanted = {
        name: shape for rule in hf_names.rules(arch) for name, shape in zip(rule.names, rule.shapes, strict=True)
    }
    missing = [name for name in wanted if name not in stored.tensors]
    if missing:
        raise CheckpointError(f"{hf_dir}: {_list(missing)} missing from the weights, but config.json asks for it")
    if arch.tied_embeddings and hf_names.HEAD in stored.tensors:
        wanted[hf_names.HEAD] = wanted[hf_names.EMBEDDING]
    extra = [name for name in stored.tensors if name not in wanted and not name.endswith(_HARMLESS)]
    if extra:
        file = stored.tensors[extra[0]].file
        raise CheckpointError(f"{file}: {_list(extra)} unexpected: a {arch.family} model has no such tensor")
    for name, shape in wanted.items():
        found = stored.tensors[name]
        if found.shape != shape:
            raise CheckpointError(f"{found.file}: {name} is {list(found.shape)}, but config.json says {list(shape)}")


def _check_tied_head(stored: HFTensors, rule: Rule, groups: ParallelGroups) -> None:
    """A tied model may store its head too, but then it must be the embedding. Each TP rank compares its own rows."""
    if hf_names.HEAD not in stored.tensors:
        return
    bounds = hf_names.shard_bounds(rule, 0, groups.tp_rank, groups.tp_size)
    if not torch.equal(stored.read(hf_names.HEAD, bounds), stored.read(hf_names.EMBEDDING, bounds)):
        raise CheckpointError(
            f"{stored.tensors[hf_names.HEAD].file}: {hf_names.HEAD} differs from {hf_names.EMBEDDING}, but "
            "config.json says tie_word_embeddings; set it to false there if the head was trained apart"
        )


def _list(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors are"
