"""One optimizer update, taken only where loss and gradient are finite: Megatron by itself skips none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from nemo_kto.distributed.collectives import reduce_sums


@dataclass(frozen=True)
class Outcome:
    """How an update went.

    Attributes:
        taken: whether weights and optimizer state have moved; the same on every rank.
        grad_norm: of the whole model, before clipping, as this rank knows it.
    """

    taken: bool
    grad_norm: float


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that Megatron has chained, or the one there is."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


@torch.no_grad()
def update(optimizer: MegatronOptimizer, device: torch.device, *, loss_is_finite: bool) -> Outcome:
    """What Megatron's ``step`` does, operation for operation, with a look at the norm before anything moves.

    All ranks call it, after gradients are reduced. Where the update is not taken, gradients stay as they are: to clear
    them is the caller's. Nothing waits for a parameter gather then: with overlapped gathers it is the reduction of
    gradients that announces the next one, which brings the values that are there already.

    Args:
        optimizer: Megatron's.
        device: where one number is reduced.
        loss_is_finite: whether this rank may update.
    """
    scaler_is_content = not optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    finite = scaler_is_content and loss_is_finite and math.isfinite(norm)
    # Asked of all, not concluded: replicas hold equal gradients only as long as no memory and no link is at fault, and
    # ranks that disagree here would part for good, in silence.
    unhappy = reduce_sums({"ranks": float(not (finite and _left_out_are_finite(optimizer)))}, dist.group.WORLD, device)
    if unhappy["ranks"] > 0:
        return Outcome(False, norm)
    for part in parts(optimizer):
        _clip(part, norm)
    return Outcome(bool(optimizer.step_with_ready_grads()), norm)


def _clip(part: MegatronOptimizer, norm: float) -> None:
    parameters = part.get_parameters()
    if parameters and part.config.clip_grad > 0.0:
        decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm, decoupled)


def _left_out_are_finite(optimizer: MegatronOptimizer) -> bool:
    """Look at the gradients that are no part of this rank's norm, because another rank counts its copy of them."""
    norms = [torch.linalg.vector_norm(gradient) for gradient in _left_out(optimizer)]
    return not norms or bool(torch.isfinite(torch.stack(norms)).all())


def _left_out(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    for part in parts(optimizer):
        gradients = part.get_main_grads_for_grad_norm()
        counted = set(map(id, gradients))
        for parameter in part.get_parameters():
            if parameter.grad is not None and id(parameter.grad) not in counted:
                yield parameter.grad
