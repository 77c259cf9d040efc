"""The learning rate as a pure function of the step, so that resuming needs no state. Sets nothing."""

from __future__ import annotations

import math

from nemo_kto.config.schema import OptimConfig


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """Learning rate of the optimizer step number ``step``, counted from 0.

    CosineAnnealing is NeMo's (nemo.core.optim.lr_scheduler): without constant steps its warm-up starts at
    lr / (warmup_steps + 1); with them it is Megatron's, which starts at 0. LinearAnnealing decays to min_lr over the
    steps between warm-up and the constant tail (NeMo's WarmupAnnealing); Constant stays at lr after the warm-up.

    Args:
        step: number of completed optimizer steps.
        optim: peak rate, and the schedule.
        max_steps: optimizer steps of the whole run.
    """
    sched = optim.sched
    tail = sched.constant_steps if sched.name != "Constant" else 0
    from_zero = sched.name == "CosineAnnealing" and tail > 0
    if sched.warmup_steps > 0 and step <= sched.warmup_steps:
        reached = step / sched.warmup_steps if from_zero else (step + 1) / (sched.warmup_steps + 1)
        return optim.lr * reached
    if sched.name == "Constant":
        return optim.lr
    decay_steps = max_steps - sched.warmup_steps - tail
    progress = (step - sched.warmup_steps) / decay_steps
    if progress > 1.0:
        return sched.min_lr
    left = 1.0 - progress if sched.name == "LinearAnnealing" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return sched.min_lr + left * (optim.lr - sched.min_lr)
