"""PEFT's LoRA directories: which adapters ``adapter_config.json`` describes. Reads no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_kto.config.lora import LoraSpec
from nemo_kto.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROJECTIONS = {
    "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_proj": ("self_attn.o_proj",),
    "linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "linear_fc2": ("mlp.down_proj",),
}
"""Megatron's linear layer -> the Hugging Face modules that it is made of, in the order of its rows."""
_NAMES = [name.rsplit(".", 1)[1] for names in PROJECTIONS.values() for name in names]
_SHORT = {name: name for name in _NAMES} | {
    name: name.rsplit(".", 1)[1] for names in PROJECTIONS.values() for name in names
}
_UNDERSTOOD = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path corda_config eva_config inference_mode init_lora_weights "
    "layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_core peft_type "
    "peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type use_rslora".split()
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftAdapters:
    """What ``adapter_config.json`` says.

    Attributes:
        rank: ``r``.
        ranks: of each projection that has an adapter, by names such as ``q_proj``.
        scale: of every low-rank product.
        layers: decoder layers, from 0; None for all.
    """

    rank: int
    ranks: Mapping[str, int]
    scale: float
    layers: tuple[int, ...] | None

    def spec(self) -> LoraSpec:
        """The adapters on Megatron's layers, as far as is known without weights: at the nominal rank."""
        ranks = {
            linear: self.rank
            for linear, names in PROJECTIONS.items()
            if any(name.rsplit(".", 1)[1] in self.ranks for name in names)
        }
        return LoraSpec(self.rank, ranks, self.scale, self.layers)


def is_peft_directory(path: str | Path) -> bool:
    """Whether ``path`` is a directory that PEFT has saved adapters to."""
    return (Path(path) / CONFIG).is_file()


def read_adapters(path: str | Path) -> PeftAdapters:
    """Read and check ``adapter_config.json``.

    Raises:
        CheckpointError: it cannot be read, or asks for what our adapters cannot be.
    """
    file = Path(path) / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, rank, alpha = config["peft_type"], int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from error
    if kind != "LORA" or rank < 1 or not alpha > 0:
        raise CheckpointError(f"{file}: peft_type {kind} with r={rank}, lora_alpha={alpha:g} is not a LoRA")
    for key, value in config.items():
        if key not in _UNDERSTOOD and value and (key, value) != ("bias", "none"):
            raise CheckpointError(f"{file}: {key}={value!r} is not supported, only plain LoRA is")
    if str(config.get("init_lora_weights")).startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{file}: init_lora_weights={config['init_lora_weights']!r} changes the base weights: save it with "
            "PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    names = _projections(file, config)
    patterns = {key: _pattern(file, config, key) for key in ("rank_pattern", "alpha_pattern")}
    ranks = {name: int(patterns["rank_pattern"].get(name, rank)) for name in names}
    alphas = {name: patterns["alpha_pattern"].get(name, alpha) for name in names}
    power = 0.5 if config.get("use_rslora") else 1.0
    scales = {alphas[name] / ranks[name] ** power for name in names}
    if len(scales) > 1:
        raise CheckpointError(f"{file}: alpha over rank differs between modules ({sorted(scales)}); it must be one")
    return PeftAdapters(rank, ranks, scales.pop(), _layers(file, config))


def _pattern(file: Path, config: dict[str, Any], key: str) -> dict[str, float]:
    """By projection. A longer path than ``self_attn.q_proj`` would be of some layers only."""
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{file}: {key}={pattern!r} is not a mapping of modules to numbers")
    found = {_SHORT.get(str(name), ""): value for name, value in pattern.items()}
    if "" in found or len(found) != len(pattern):
        raise CheckpointError(f"{file}: {key}={pattern} is not by the names {', '.join(_NAMES)} alone")
    for name, value in found.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or value <= 0 or (key == "rank_pattern" and value != int(value)):
            raise CheckpointError(f"{file}: {key} gives {name} {value!r}, which is no {key.split('_')[0]}")
    return found


def _projections(file: Path, config: dict[str, Any]) -> frozenset[str]:
    """Module names are matched as PEFT does: a list by suffix, a string as a pattern of the whole name."""
    wanted = config.get("target_modules")
    modules = {name.rsplit(".", 1)[1]: f"model.layers.0.{name}" for names in PROJECTIONS.values() for name in names}
    if wanted == "all-linear":
        return frozenset(modules)
    if isinstance(wanted, str):
        try:
            found = {short for short, full in modules.items() if re.fullmatch(wanted, full)}
        except re.error as error:
            raise CheckpointError(f"{file}: target_modules={wanted!r} is no pattern: {error}") from error
    elif not isinstance(wanted, list):
        raise CheckpointError(f"{file}: target_modules={wanted!r} is neither a list of modules nor a pattern")
    else:
        unknown = [name for name in wanted or [] if str(name).rsplit(".", 1)[-1] not in modules]
        if unknown:
            raise CheckpointError(
                f"{file}: target_modules {unknown} are no linear layers of a decoder layer: {', '.join(_NAMES)}"
            )
        found = {str(name).rsplit(".", 1)[-1] for name in wanted or []}
    if not found:
        raise CheckpointError(f"{file}: target_modules={wanted!r} names none of {', '.join(_NAMES)}")
    return frozenset(found)


def _layers(file: Path, config: dict[str, Any]) -> tuple[int, ...] | None:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    numbers = [layers] if isinstance(layers, int) else layers
    if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
        raise CheckpointError(f"{file}: layers_to_transform={layers!r} is not a list of layers")
    if min(numbers) < 0:  # PEFT would give such a layer no adapter
        raise CheckpointError(f"{file}: layers_to_transform={layers!r}: layers are counted from 0, none is negative")
    return tuple(sorted(set(numbers)))
