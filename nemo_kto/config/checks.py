"""What a config must satisfy beyond types. Needs numbers only: no model, no data, no process group."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_kto.config.architecture import Architecture
from nemo_kto.config.archives import is_archive
from nemo_kto.config.layout import world_problems
from nemo_kto.config.lora import problems as peft_problems
from nemo_kto.config.reference import problems as reference_problems
from nemo_kto.config.reference_cache import problems as cache_problems
from nemo_kto.config.schema import Config, ExpManagerConfig, KTOConfig, KTOLoopConfig, ModelConfig, OptimConfig
from nemo_kto.errors import ConfigError

_PRECISIONS = ("32", "32-true", "bf16", "bf16-mixed", "bf16-true")
MONITORS = (
    "val_loss",
    "val/loss",
    "val/kl",
    "val/rewards/chosen",
    "val/rewards/rejected",
    "val/rewards/margins",
    "val/rewards/accuracies",
    "val/logps/chosen",
    "val/logps/rejected",
)


def check(config: Config, world_size: int, nodes: int = 1) -> None:
    """Refuse a config that cannot do what it says on ``world_size`` ranks, spread evenly over ``nodes``.

    Raises:
        ConfigError: lists every problem found, one per line, each naming its key and the fix.
    """
    problems = [
        *_finite("", asdict(config)),
        *_trainer(config),
        *_loop(config.trainer.kto),
        *_exp_manager(config.exp_manager),
        *_sizes(config.model),
        *_objective(config.model.kto),
        *_optimizer(config.model.optim),
        *_data(config.model),
        *world_problems(config.model, world_size, nodes),
        *_paths(config),
        *cache_problems(config),
        *peft_problems(config.model, config.pretrained_checkpoint.restore_from_path),
        *reference_problems(config, world_size),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def check_schedule(optim: OptimConfig, max_steps: int) -> None:
    """Refuse a learning-rate schedule that has no room in ``max_steps`` optimizer steps."""
    sched = optim.sched
    constant = 0 if sched.name == "Constant" else sched.constant_steps
    if sched.warmup_steps + constant >= max_steps:
        raise ConfigError(
            f"model.optim.sched: warmup_steps {sched.warmup_steps} + constant_steps {constant} leave nothing of the "
            f"{max_steps} steps of this run: lower them or train longer (trainer.kto.max_steps, max_epochs)"
        )


def check_recompute(arch: Architecture, model: ModelConfig) -> None:
    """Refuse recomputed units that do not fit the layers of a pipeline stage."""
    unit, layers = model.activations_checkpoint_num_layers, arch.num_layers // model.pipeline_model_parallel_size
    if unit is None:
        return
    if unit > layers or (model.activations_checkpoint_method == "uniform" and layers % unit):
        raise ConfigError(
            f"model.activations_checkpoint_num_layers={unit} does not fit the {layers} layers of a pipeline stage: "
            f"give at most {layers}, and with activations_checkpoint_method=uniform a divisor of it"
        )


def check_profile(steps: list[int] | None, total_steps: int) -> None:
    """Refuse a trace of steps that the run does not have."""
    if steps is not None and steps[0] > total_steps:
        raise ConfigError(f"exp_manager.profile_steps={steps} begins after the last of this run's {total_steps} steps")


def check_length(arch: Architecture, seq_length: int) -> None:
    """Refuse rows longer than the model can attend over."""
    if seq_length > arch.max_position_embeddings:
        raise ConfigError(
            f"model.data.seq_length={seq_length} is above the model's max_position_embeddings "
            f"{arch.max_position_embeddings}"
        )
    if arch.sliding_window is not None and seq_length > arch.sliding_window:
        raise ConfigError(
            f"model.data.seq_length={seq_length} is above the model's sliding_window {arch.sliding_window}: "
            "attention here is over the whole row, so longer rows would not be the model's own"
        )


def _finite(prefix: str, values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _finite(f"{prefix}{name}.", value)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                yield f"{prefix}{name}={number} must be a finite number"


def _one_of(key: str, value: object, allowed: Iterable[str]) -> Iterator[str]:
    if str(value) not in allowed:
        yield f"{key}={value} is not one of {', '.join(allowed)}"


def _at_least(minimum: float, **values: float | None) -> Iterator[str]:
    """Keys come with ``__`` for dots."""
    for name, value in values.items():
        if value is not None and not value >= minimum:
            yield f"{name.replace('__', '.')}={value} must be at least {minimum:g}"


def _above(minimum: float, key: str, value: float) -> Iterator[str]:
    if not value > minimum:
        yield f"{key}={value} must be above {minimum:g}"


def _trainer(config: Config) -> Iterator[str]:
    trainer = config.trainer
    yield from _one_of("trainer.accelerator", trainer.accelerator, ("auto", "gpu", "cpu"))
    yield from _one_of("trainer.precision", trainer.precision, _PRECISIONS)
    yield from _at_least(1, trainer__devices=trainer.devices, trainer__num_nodes=trainer.num_nodes)
    yield from _above(0, "trainer.join_timeout_minutes", trainer.join_timeout_minutes)
    yield from _at_least(1, trainer__distributed_timeout_minutes=trainer.distributed_timeout_minutes)


def _loop(loop: KTOLoopConfig) -> Iterator[str]:
    yield from _at_least(1, trainer__kto__max_epochs=loop.max_epochs, trainer__kto__save_interval=loop.save_interval)
    yield from _at_least(0, trainer__kto__gradient_clip_val=loop.gradient_clip_val)
    yield from _at_least(0, trainer__kto__max_consecutive_skips=loop.max_consecutive_skips)
    if loop.max_steps != -1:
        yield from _at_least(1, trainer__kto__max_steps=loop.max_steps)
    for name, value, minimum in (
        ("val_check_interval", loop.val_check_interval, 1),
        ("limit_train_batches", loop.limit_train_batches, 1),
        ("limit_val_batches", loop.limit_val_batches, 0),
    ):
        if isinstance(value, float):
            if not (0.0 < value <= 1.0 or (minimum == 0 and value == 0.0)):
                yield f"trainer.kto.{name}={value} is a fraction: give one in (0, 1], or a whole number of batches"
        elif value < minimum:
            yield f"trainer.kto.{name}={value} must be at least {minimum}"


def _exp_manager(exp: ExpManagerConfig) -> Iterator[str]:
    params = exp.checkpoint_callback_params
    prefix = "exp_manager.checkpoint_callback_params"
    yield from _one_of(f"{prefix}.monitor", params.monitor, MONITORS)
    yield from _one_of(f"{prefix}.mode", params.mode, ("min", "max"))
    keys = prefix.replace(".", "__")
    yield from _at_least(-1, **{f"{keys}__save_top_k": params.save_top_k})
    yield from _at_least(1, **{f"{keys}__save_last_k": params.save_last_k})
    if exp.max_time_per_run is not None and not re.fullmatch(r"\d\d:\d\d:\d\d:\d\d", exp.max_time_per_run):
        yield f'exp_manager.max_time_per_run={exp.max_time_per_run} is not "DD:HH:MM:SS", such as "00:03:50:00"'
    elif exp.max_time_per_run == "00:00:00:00":
        yield "exp_manager.max_time_per_run=00:00:00:00 leaves no time for a step; null is no limit"
    steps = exp.profile_steps
    if steps is not None and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        yield f"exp_manager.profile_steps={steps} is not [first, last], two steps counted from 1, such as [10, 12]"


def _sizes(model: ModelConfig) -> Iterator[str]:
    yield from _at_least(
        1,
        model__micro_batch_size=model.micro_batch_size,
        model__tensor_model_parallel_size=model.tensor_model_parallel_size,
        model__pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        model__activations_checkpoint_num_layers=model.activations_checkpoint_num_layers,
    )
    if model.global_batch_size < 2:
        yield (
            f"model.global_batch_size={model.global_batch_size}: KTO pairs each prompt with another sample's "
            "response, so a batch needs at least 2 samples"
        )
    for name in ("hidden_dropout", "attention_dropout"):
        if not 0.0 <= getattr(model, name) < 1.0:
            yield f"model.{name}={getattr(model, name)} must be in [0, 1)"
    if model.context_parallel_size != 1:
        yield "model.context_parallel_size: context parallelism is not available, use 1 and shard by tensor, pipeline"
    if model.virtual_pipeline_model_parallel_size is not None:
        yield "model.virtual_pipeline_model_parallel_size: not available yet, use null"
    yield from _recompute(model)


def _recompute(model: ModelConfig) -> Iterator[str]:
    granularity = model.activations_checkpoint_granularity
    if granularity not in (None, "selective", "full"):
        yield f"model.activations_checkpoint_granularity={granularity} is not one of null, selective, full"
    if granularity == "full":
        if model.activations_checkpoint_method not in ("uniform", "block"):
            yield "model.activations_checkpoint_method must be uniform or block where the granularity is full"
        if model.activations_checkpoint_num_layers is None:
            yield "model.activations_checkpoint_num_layers must be set where the granularity is full"
    elif model.activations_checkpoint_method is not None or model.activations_checkpoint_num_layers is not None:
        yield (
            "model.activations_checkpoint_method and _num_layers belong to activations_checkpoint_granularity=full: "
            "set that, or leave them null"
        )


def _objective(kto: KTOConfig) -> Iterator[str]:
    yield from _one_of("model.kto.kl_clamp", kto.kl_clamp, ("per_sample", "batch_mean"))
    yield from _one_of("model.kto.loss_normalization", kto.loss_normalization, ("per_class", "per_batch"))
    yield from _one_of("model.kto.loss_type", kto.loss_type, ("kto", "apo_zero_unpaired"))
    yield from _one_of("model.kto.reference", kto.reference, ("auto", "swap", "adapters_off", "cache"))
    yield from _above(0, "model.kto.ref_policy_kl_penalty", kto.ref_policy_kl_penalty)
    yield from _at_least(
        0,
        model__kto__desirable_loss_weight=kto.desirable_loss_weight,
        model__kto__undesirable_loss_weight=kto.undesirable_loss_weight,
        model__kto__preference_loss_weight=kto.preference_loss_weight,
        model__kto__sft_loss_weight=kto.sft_loss_weight,
    )
    yield from _at_least(1, model__kto__log_prob_forward_micro_batch_size=kto.log_prob_forward_micro_batch_size)
    if kto.preference_loss_weight == 0 and kto.sft_loss_weight == 0:
        yield "model.kto: preference_loss_weight and sft_loss_weight are both 0, so nothing would be learnt"
    if kto.desirable_loss_weight == 0 and kto.undesirable_loss_weight == 0 and kto.preference_loss_weight > 0:
        yield "model.kto: desirable_loss_weight and undesirable_loss_weight are both 0, so nothing would be learnt"


def _optimizer(optim: OptimConfig) -> Iterator[str]:
    yield from _one_of("model.optim.name", optim.name, ("distributed_fused_adam", "adamw", "sgd"))
    yield from _one_of("model.optim.sched.name", optim.sched.name, ("CosineAnnealing", "LinearAnnealing", "Constant"))
    yield from _above(0, "model.optim.lr", optim.lr)
    yield from _above(0, "model.optim.eps", optim.eps)
    yield from _at_least(
        0,
        model__optim__weight_decay=optim.weight_decay,
        model__optim__momentum=optim.momentum,
        model__optim__sched__warmup_steps=optim.sched.warmup_steps,
        model__optim__sched__constant_steps=optim.sched.constant_steps,
        model__optim__sched__min_lr=optim.sched.min_lr,
    )
    if len(optim.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in optim.betas):
        yield f"model.optim.betas={list(optim.betas)} must be two numbers in [0, 1)"
    if optim.sched.name != "Constant" and optim.sched.min_lr > optim.lr:
        yield f"model.optim.sched.min_lr={optim.sched.min_lr} is above model.optim.lr={optim.lr}"
    if optim.overlap_param_sync and not (optim.is_distributed and optim.overlap_grad_sync):
        yield (
            "model.optim.overlap_param_sync needs model.optim.name=distributed_fused_adam and "
            "model.optim.overlap_grad_sync=true"
        )


def _data(model: ModelConfig) -> Iterator[str]:
    data = model.data
    yield from _one_of("model.data.overlong", data.overlong, ("drop", "truncate", "error"))
    yield from _at_least(2, model__data__seq_length=data.seq_length)
    yield from _at_least(0, model__data__num_workers=data.num_workers)
    yield from _at_least(1, model__data__tokenize_workers=data.tokenize_workers)
    if not data.data_prefix.train:
        yield "model.data.data_prefix.train is empty: list at least one file"
    if model.sequence_parallel and data.seq_length % max(1, model.tensor_model_parallel_size):
        yield (
            f"model.data.seq_length={data.seq_length} is not a multiple of model.tensor_model_parallel_size="
            f"{model.tensor_model_parallel_size}, which model.sequence_parallel needs"
        )


def _paths(config: Config) -> Iterator[str]:
    policy, reference = config.pretrained_checkpoint.restore_from_path, config.model.kto.reference_from_path
    for key, path in (
        ("pretrained_checkpoint.restore_from_path", policy),
        ("model.kto.reference_from_path", None if reference == policy else reference),
        ("exp_manager.resume_from_checkpoint", config.exp_manager.resume_from_checkpoint),
    ):
        if path is not None and not Path(path).exists():
            yield f"{key}={path} does not exist"
        elif path is not None and not Path(path).is_dir() and (key.startswith("exp_manager") or not is_archive(path)):
            archive = "" if key.startswith("exp_manager") else ", or a .nemo file"
            yield f"{key}={path} is not a directory: give a Hugging Face or Megatron checkpoint directory{archive}"
