"""Megatron's data-parallel wrapper and optimizer, built from config, and the face of both that Lightning sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import nn

from nemo_kto.config.schema import OptimConfig
from nemo_kto.gpt.live import require_policy
from nemo_kto.gpt.network import unwrap
from nemo_kto.training.update import parts, update


def wrap_data_parallel(chunks: Sequence[nn.Module], optim: OptimConfig) -> list[nn.Module]:
    """Wrap model chunks in Megatron's DDP: gradients in contiguous float32 buffers, averaged over DP ranks."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=optim.overlap_grad_sync,
        overlap_param_gather=optim.overlap_param_sync,
        use_distributed_optimizer=optim.is_distributed,
    )
    wrapped = [
        DistributedDataParallel(unwrap(chunk).config, config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def build_optimizer(chunks: Sequence[nn.Module], optim: OptimConfig, *, clip_grad: float) -> MegatronOptimizer:
    """Megatron's optimizer over DDP-wrapped chunks, and the schedule hooks that belong to it.

    Weight decay acts on matrices only. Of bf16 parameters, masters and state are float32. What is frozen has none.

    Args:
        chunks: output of :func:`wrap_data_parallel`.
        optim: ``model.optim``.
        clip_grad: maximum global gradient norm, 0 for none.
    """
    bf16 = any(p.dtype == torch.bfloat16 for chunk in chunks for p in chunk.parameters() if p.requires_grad)
    config = OptimizerConfig(
        optimizer="sgd" if optim.name == "sgd" else "adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        sgd_momentum=optim.momentum,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=optim.is_distributed,
        overlap_param_gather=optim.overlap_param_sync,
        # Megatron computes the norm only where it clips, and the norm is a metric
        clip_grad=clip_grad or math.inf,
    )
    optimizer = get_megatron_optimizer(config, list(chunks), get_standard_config_overrides(config))
    for part in parts(optimizer):
        _mend(part)
        if part.init_state_fn is None:  # of SGD; Megatron 0.16 calls it before every load all the same
            part.init_state_fn = _nothing_to_prepare
    _connect_schedule(chunks, optimizer, optim)
    return optimizer


def float32_masters(optimizer: MegatronOptimizer) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Every bf16 parameter of this rank with its float32 master: of the whole, or [n] of a data-parallel shard of it.

    Float32 parameters have none: what their optimizer updates is a view of the live weights.
    """
    for part in parts(optimizer):
        if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer:
            groups = zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True)
        elif isinstance(part, Float16OptimizerWithFloat16Params) and not part.is_stub_optimizer:
            groups = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        else:
            continue
        for parameters, masters in groups:
            yield from zip(parameters, masters, strict=True)


def set_learning_rate(optimizer: MegatronOptimizer, rate: float, weight_decay: float) -> None:
    """Set every group's rate and decay; Megatron leaves both to its scheduler, which this replaces."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def restate(optimizer: MegatronOptimizer, optim: OptimConfig) -> None:
    """Set what a loaded checkpoint has set to its own run's values, but for rate and decay, which every step sets."""
    wanted = {"betas": tuple(optim.betas), "eps": optim.eps, "momentum": optim.momentum}
    for group in optimizer.param_groups:
        group.update({name: value for name, value in wanted.items() if name in group})


def prime_state(optimizer: MegatronOptimizer) -> None:
    """Make Adam's state exist before a checkpoint is loaded into it: Megatron's state_dict asserts that it does.

    One step with zero gradient, rate and decay; the values it leaves are overwritten by the load.
    """
    for part in parts(optimizer):
        inner = part.optimizer
        if inner is None or inner.state:
            continue
        saved = [(group["lr"], group["weight_decay"]) for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        inner.step()
        inner.zero_grad(set_to_none=True)
        for group, (rate, decay) in zip(inner.param_groups, saved, strict=True):
            group["lr"], group["weight_decay"] = rate, decay


def _nothing_to_prepare(inner: torch.optim.Optimizer, config: OptimizerConfig | None = None) -> None:
    """Before a load; :func:`prime_state` has done it."""


def _mend(part: MegatronOptimizer) -> None:
    """Where neither Transformer Engine nor Apex is there, Megatron falls back to torch's AdamW: make it fused."""
    inner = part.optimizer
    if isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
        inner.defaults["fused"] = True
        for group in inner.param_groups:
            group["fused"], group["foreach"] = True, False
    if isinstance(part, DistributedOptimizer):
        part.__class__ = MendedDistributedOptimizer


def _connect_schedule(chunks: Sequence[nn.Module], optimizer: MegatronOptimizer, optim: OptimConfig) -> None:
    """Tell the pipeline schedule how to scale the loss, and when to reduce gradients and gather parameters."""
    config = unwrap(chunks[0]).config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if optim.overlap_grad_sync:
        config.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync
    if optim.overlap_param_sync and len(chunks) > 1:
        config.param_sync_func = [c.start_param_sync for c in chunks]


class MendedDistributedOptimizer(DistributedOptimizer):  # type: ignore[misc]
    """Megatron 0.16's distributed optimizer with its checkpoints mended. They are silently wrong without this.

    Upstream cuts parameters out of a gathered buffer at offsets that count the padding between buckets, after it has
    squeezed that padding out: with several buckets (tied embeddings in a pipeline, overlapped reduction) masters and
    moments after the first padding are shifted, and the last ones cut off.

    With torch's Adam it also iterates over ``step`` where loaders have dropped it, copies into leaf views without
    ``no_grad``, and gives all parameters one shared ``step`` tensor, which Adam then advances once per parameter.
    """

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        """Masters and moments, gathered, at the offsets of ``param_index_map``."""
        gathered: dict[Any, Any] | None = super().get_parameter_state_dp_zero(*args, **kwargs)
        for number, buffer in enumerate(self.buffers if gathered is not None else ()):
            for columns in gathered[number].values():
                for name, squeezed in columns.items():
                    if isinstance(squeezed, torch.Tensor):
                        columns[name] = _with_padding(squeezed, buffer)
        return gathered

    def _set_main_param_and_optimizer_states(self, model_param: nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        with torch.no_grad():
            complete = {**tensors, "step": state["step"]} if "step" in state else tensors
            super()._set_main_param_and_optimizer_states(model_param, complete)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, and give every parameter a step of its own."""
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


def _with_padding(squeezed: torch.Tensor, buffer: Any) -> torch.Tensor:
    """Elements of all buckets one after the other -> the same with the padding at each bucket's end."""
    padded = squeezed.new_zeros(buffer.numel)
    offset = 0
    for (start, _), bucket in zip(buffer.bucket_indices, buffer.buckets, strict=True):
        size = bucket.numel_unpadded
        padded[start : start + size] = squeezed[offset : offset + size]
        offset += size
    return padded


class LightningMegatronOptimizer(torch.optim.Optimizer):
    """What Lightning needs of an optimizer (it counts steps), around Megatron's. State stays with Megatron."""

    def __init__(self, megatron: MegatronOptimizer, chunks: Sequence[nn.Module]) -> None:
        # not calling super().__init__: parameter groups and state live in the wrapped optimizer
        self.megatron = megatron
        self._chunks = chunks
        self.defaults: dict[str, Any] = {}
        self.succeeded = True
        self.grad_norm = 0.0

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Megatron's parameter groups."""
        groups: list[dict[str, Any]] = self.megatron.param_groups
        return groups

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """Empty: Lightning would move what it finds here."""
        return {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients of the masters; the caller zeroes Megatron's gradient buffers."""
        self.megatron.zero_grad(set_to_none)

    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, loss_is_finite: bool = True
    ) -> None:
        """One update, or none where loss or gradient are not finite: then the gradients are cleared.

        All ranks do the same. ``succeeded`` and ``grad_norm`` (before clipping) tell how it went.

        Args:
            closure: called first.
            loss_is_finite: False to skip the update whatever the gradient is.
        """
        if closure is not None:
            closure()
        require_policy(self._chunks, "an optimizer step")
        device = next(self._chunks[0].parameters()).device
        outcome = update(self.megatron, device, loss_is_finite=loss_is_finite)
        self.succeeded, self.grad_norm = outcome.taken, outcome.grad_norm
        if not outcome.taken:
            for chunk in self._chunks:
                chunk.zero_grad_buffer()
            self.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Empty: the strategy saves Megatron's sharded state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do: the strategy loads Megatron's sharded state."""
