"""A checkpoint of adapters to a directory that PEFT loads. No network is built: one process has room enough."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors.torch import save_file

from nemo_kto.checkpoint.dist import damages
from nemo_kto.checkpoint.metadata import check_metadata
from nemo_kto.checkpoint.peft_files import shapes, split
from nemo_kto.checkpoint.sharded import adapter_key
from nemo_kto.checkpoint.together import on_all_ranks
from nemo_kto.config.adapter_record import AdapterRecord, read_record
from nemo_kto.config.architecture import Architecture
from nemo_kto.config.lora import LoraSpec
from nemo_kto.config.manifest import MANIFEST
from nemo_kto.config.peft_dir import CONFIG, PROJECTIONS, WEIGHTS
from nemo_kto.errors import CheckpointError


def export_peft(checkpoint: str | Path, arch: Architecture, out_dir: str | Path, *, base: str | None = None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, float32.

    Args:
        checkpoint: of adapters.
        arch: the base model's.
        out_dir: must not exist.
        base: what PEFT is to load the base model from; None: the path that the run was given.

    Raises:
        CheckpointError: the checkpoint cannot be read, or ``out_dir`` exists or cannot be written.
    """
    out_dir, record = Path(out_dir), read_record(checkpoint)
    if out_dir.exists():
        raise CheckpointError(f"{out_dir} exists: remove it or choose another directory")
    tensors: dict[str, torch.Tensor] = {}
    for (layer, linear), (a, b) in _matrices(Path(checkpoint), arch, record.spec).items():
        tensors |= split(arch, layer, linear, a, b)
    draft = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        save_file(tensors, draft / WEIGHTS, {"format": "pt"})
        (draft / CONFIG).write_text(json.dumps(_config(record, base), indent=2) + "\n", encoding="utf-8")
        draft.rename(out_dir)
    except OSError as error:
        raise CheckpointError(f"{out_dir} cannot be written: {error}") from error


def _matrices(
    checkpoint: Path, arch: Architecture, spec: LoraSpec
) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """A and B of every adapter, whole."""
    template = {}
    for layer in filter(spec.has, range(arch.num_layers)):
        for linear, rank in spec.ranks.items():
            rows = sum(shape[0] for shape in shapes(arch, linear))
            columns = shapes(arch, linear)[0][1]
            for half, shape in (("a", (rank, columns)), ("b", (rows, rank))):
                key = adapter_key(layer, linear, half)
                template[key] = ShardedTensor.from_rank_offsets(key, torch.empty(shape))
    damage = damages(checkpoint) if (checkpoint / MANIFEST).is_file() else []
    if damage:
        raise CheckpointError(f"{checkpoint} is damaged: {damage[0]}")

    def read() -> dict[str, torch.Tensor]:
        check_metadata(checkpoint, template)
        tensors: dict[str, torch.Tensor] = dist_checkpointing.load({"adapters": template}, str(checkpoint))["adapters"]
        return tensors

    found = on_all_ranks(read, f"{checkpoint} is damaged, or of another model")
    return {
        (layer, linear): (found[adapter_key(layer, linear, "a")], found[adapter_key(layer, linear, "b")])
        for layer in filter(spec.has, range(arch.num_layers))
        for linear in spec.ranks
    }


def _config(record: AdapterRecord, base: str | None) -> dict[str, object]:
    spec = record.spec
    names = {name.rsplit(".", 1)[1]: rank for linear, rank in spec.ranks.items() for name in PROJECTIONS[linear]}
    other = {name: rank for name, rank in names.items() if rank != spec.adapter_dim}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or record.base,
        "r": spec.adapter_dim,
        "lora_alpha": spec.scale * spec.adapter_dim,
        "rank_pattern": other,
        "alpha_pattern": {name: spec.scale * rank for name, rank in other.items()},
        "lora_dropout": 0.0,
        "target_modules": sorted(names),
        "layers_to_transform": None if spec.layers is None else list(spec.layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
