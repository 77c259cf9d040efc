"""What is wrong with the settings of the weight swap. Needs numbers only."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_kto.config.lora import reference_mode
from nemo_kto.config.schema import Config, KTOConfig

WAYS = ("auto", "device", "masters", "host")


def problems(config: Config, world_size: int) -> Iterator[str]:
    """One line for each setting of ``model.kto.reference_*`` that cannot do what it says on ``world_size`` ranks."""
    kto = config.model.kto
    lookahead, restore = f"model.kto.reference_lookahead={kto.reference_lookahead}", _restore(kto)
    if kto.reference_lookahead < 1:
        yield f"{lookahead} must be at least 1"
    if kto.reference_restore not in WAYS:
        yield f"{restore} is not one of {', '.join(WAYS)}"
    if reference_mode(config.model) == "adapters_off":
        if kto.reference_lookahead > 1:
            yield f"{lookahead} saves weight swaps, and model.kto.reference=adapters_off has none: leave it at 1"
        if kto.reference_restore != "auto":
            yield f"{restore} is about weight swaps, and model.kto.reference=adapters_off has none: leave it at auto"
    elif kto.reference_restore == "masters":
        yield from _masters(config, world_size)


def _masters(config: Config, world_size: int) -> Iterator[str]:
    """Masters must exist, apart from the live weights, and each rank must have those of all its weights."""
    model, restore = config.model, _restore(config.model.kto)
    if model.peft.peft_scheme != "none":
        yield f"{restore}: adapters are float32 and have no masters apart from them; use auto, device or host"
        return
    if not config.trainer.is_bf16:
        yield (
            f"{restore}: with trainer.precision={config.trainer.precision} the optimizer updates the live weights and "
            "has no masters apart from them; use auto, device or host"
        )
    ranks_per_model = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    if model.optim.is_distributed and world_size > ranks_per_model:
        yield (
            f"{restore}: model.optim.name={model.optim.name} leaves each data-parallel rank the masters of its own "
            "shard; use auto, device or host, or model.optim.name=adamw"
        )


def _restore(kto: KTOConfig) -> str:
    return f"model.kto.reference_restore={kto.reference_restore}"
