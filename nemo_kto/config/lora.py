"""What ``model.peft`` asks for, in terms of Megatron's linear layers. Builds nothing.

Key names and their meanings are NeMo-Aligner's (``lora_tuning`` of its ``gpt_kto.yaml``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_kto.config.schema import ModelConfig, PeftConfig
from nemo_kto.errors import CheckpointError, ConfigError

LINEARS = {
    "attention_qkv": "linear_qkv",
    "attention_dense": "linear_proj",
    "mlp_fc1": "linear_fc1",
    "mlp_fc2": "linear_fc2",
}
"""NeMo-Aligner's name of a target -> Megatron's linear layer."""
GROUPS = {
    "attention": ("attention_qkv", "attention_dense"),
    "mlp": ("mlp_fc1", "mlp_fc2"),
    "all": tuple(LINEARS),
}
INIT_METHODS = ("xavier", "normal", "zero")
LOW_RATE = 5e-5
"""Learning rates below this one hardly move adapters; the default is one for full fine-tuning."""
_KEYS = "model.peft.lora_tuning"


@dataclass(frozen=True)
class LoraSpec:
    """The adapters of a network, independent of its layout.

    Attributes:
        adapter_dim: nominal rank.
        ranks: linear layer (a value of ``LINEARS``) -> rank of its adapter, in forward order. A multiple of
            ``adapter_dim`` where a layer is several in Hugging Face's model, and each began with an A of its own.
        scale: factor of every low-rank product: alpha / adapter_dim.
        layers: decoder layers that have adapters, from 0, ascending; None for all.
    """

    adapter_dim: int
    ranks: Mapping[str, int]
    scale: float
    layers: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values; :meth:`from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any, source: object) -> LoraSpec:
        """Read what :meth:`to_json` gave.

        Raises:
            CheckpointError: it is not that; names ``source``.
        """
        try:
            ranks = {str(name): int(rank) for name, rank in values["ranks"].items()}
            layers = values["layers"]
            selected = None if layers is None else tuple(int(number) for number in layers)
            spec = cls(int(values["adapter_dim"]), ranks, float(values["scale"]), selected)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{source} does not describe LoRA adapters: {error!r}") from error
        if not spec.ranks or set(spec.ranks) - set(LINEARS.values()) or min(spec.ranks.values()) < 1:
            raise CheckpointError(f"{source} does not describe LoRA adapters: ranks {dict(spec.ranks)}")
        return spec

    def check_same(self, wanted: LoraSpec, source: object) -> None:
        """Refuse adapters of ``source``, which this describes, where the config asks for others.

        Raises:
            ConfigError: tells what to set.
        """
        same = math.isclose(self.scale, wanted.scale, rel_tol=1e-9)  # alpha is told in decimal digits
        mine = (self.adapter_dim, list(self.ranks), self.layers)
        if not same or mine != (wanted.adapter_dim, list(wanted.ranks), wanted.layers):
            names = {linear: name for name, linear in LINEARS.items()}
            layers = "null" if self.layers is None else f"[{','.join(str(layer + 1) for layer in self.layers)}]"
            raise ConfigError(
                f"{_KEYS} does not describe the adapters of {source}: set target_modules="
                f"[{','.join(names[linear] for linear in self.ranks)}] adapter_dim={self.adapter_dim} "
                f"alpha={self.scale * self.adapter_dim:.12g} layer_selection={layers}"
            )

    def has(self, layer: int) -> bool:
        """Whether a decoder layer, from 0, has adapters."""
        return self.layers is None or layer in self.layers


def lora_spec(peft: PeftConfig) -> LoraSpec | None:
    """The adapters that a valid ``model.peft`` asks for; None for ``peft_scheme: none``."""
    if peft.peft_scheme == "none":
        return None
    tuning = peft.lora_tuning
    wanted = {part for target in tuning.target_modules for part in GROUPS.get(target, (target,))}
    ranks = {linear: tuning.adapter_dim for target, linear in LINEARS.items() if target in wanted}
    alpha = tuning.adapter_dim if tuning.alpha is None else tuning.alpha
    selection = tuning.layer_selection
    layers = None if selection is None else tuple(sorted({number - 1 for number in selection}))
    return LoraSpec(tuning.adapter_dim, ranks, alpha / tuning.adapter_dim, layers)


def reference_mode(model: ModelConfig) -> str:
    """``swap`` or ``adapters_off``: what scores rows under ``model.kto.reference``; ``auto`` and ``cache`` decided."""
    if model.kto.reference not in ("auto", "cache"):
        return model.kto.reference
    return "swap" if model.peft.peft_scheme == "none" else "adapters_off"


def rate_warning(model: ModelConfig) -> str | None:
    """What to say of a learning rate too low for adapters; None where there is nothing to say."""
    if model.peft.peft_scheme == "none" or model.optim.lr >= LOW_RATE:
        return None
    return (
        f"model.optim.lr={model.optim.lr:g} is a rate for full fine-tuning, and LoRA hardly moves with it: "
        "1e-4 to 5e-4 are usual (docs/lora.md)"
    )


def problems(model: ModelConfig, start: str) -> Iterator[str]:
    """What is wrong with ``model.peft`` and the reference that goes with it, one line each.

    Args:
        model: the config's section.
        start: ``pretrained_checkpoint.restore_from_path``.
    """
    peft, reference = model.peft, reference_mode(model)
    if peft.peft_scheme not in ("none", "lora"):
        yield f"model.peft.peft_scheme={peft.peft_scheme} is not one of none, lora"
        return
    if peft.peft_scheme == "none":
        if reference == "adapters_off":
            yield "model.kto.reference=adapters_off needs adapters: set model.peft.peft_scheme=lora, or use swap"
        if peft.restore_from_path is not None:
            yield "model.peft.restore_from_path needs model.peft.peft_scheme=lora"
        return
    if reference == "swap" and peft.restore_from_path is None:
        yield (
            "model.kto.reference=swap with LoRA takes base + an earlier adapter as the reference: set "
            "model.peft.restore_from_path, or use model.kto.reference=adapters_off"
        )
    if model.kto.reference_from_path != start:
        yield (
            "model.kto.reference_from_path with LoRA: the reference is the base model, or base + "
            "model.peft.restore_from_path with model.kto.reference=swap; leave it at its default"
        )
    yield from _tuning_problems(peft)


def _tuning_problems(peft: PeftConfig) -> Iterator[str]:
    tuning = peft.lora_tuning
    names = (*LINEARS, *GROUPS)
    unknown = [name for name in tuning.target_modules if name not in names]
    if unknown or not tuning.target_modules:
        yield f"{_KEYS}.target_modules={tuning.target_modules}: choose some of {', '.join(names)}"
    if tuning.adapter_dim < 1:
        yield f"{_KEYS}.adapter_dim={tuning.adapter_dim} must be at least 1"
    if tuning.alpha is not None and tuning.alpha <= 0:
        yield f"{_KEYS}.alpha={tuning.alpha} must be above 0, or null for adapter_dim"
    if not 0.0 <= tuning.adapter_dropout < 1.0:
        yield f"{_KEYS}.adapter_dropout={tuning.adapter_dropout} must be in [0, 1)"
    for key in ("column_init_method", "row_init_method"):
        if getattr(tuning, key) not in INIT_METHODS:
            yield f"{_KEYS}.{key}={getattr(tuning, key)} is not one of {', '.join(INIT_METHODS)}"
    if tuning.column_init_method == tuning.row_init_method == "zero":
        yield f"{_KEYS}: column_init_method and row_init_method are both zero, so no gradient would ever reach either"
    if tuning.layer_selection is not None and (not tuning.layer_selection or min(tuning.layer_selection) < 1):
        yield f"{_KEYS}.layer_selection={tuning.layer_selection}: list decoder layers, counted from 1, or null for all"


def check_layers(spec: LoraSpec, num_layers: int, pipeline_parallel: int) -> None:
    """Check adapters against the depth of a network and of its pipeline.

    A stage without adapters has nothing to train and would pass no gradient on to the stage before.

    Raises:
        ConfigError: a selected layer does not exist, or a stage has none of them.
    """
    if spec.layers is None:
        return
    beyond = [layer + 1 for layer in spec.layers if layer >= num_layers]
    if beyond:
        raise ConfigError(f"{_KEYS}.layer_selection: the model has {num_layers} layers, there is no layer {beyond[0]}")
    per_stage = num_layers // pipeline_parallel
    for stage in range(pipeline_parallel):
        span: Sequence[int] = range(stage * per_stage, (stage + 1) * per_stage)
        if not any(spec.has(layer) for layer in span):
            raise ConfigError(
                f"{_KEYS}.layer_selection gives pipeline stage {stage} (layers {span[0] + 1} to {span[-1] + 1}) no "
                "adapter: select a layer of every stage, or lower model.pipeline_model_parallel_size"
            )
