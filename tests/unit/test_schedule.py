"""The learning rate, step by step, against NeMo's own schedulers."""

from __future__ import annotations

import itertools

import pytest
import torch

from nemo_kto.config.schema import OptimConfig, ScheduleConfig
from nemo_kto.training.schedule import learning_rate

LR, MIN_LR = 9e-6, 9e-7
ULPS = 1e-14
"""Relative: both sides are a handful of float64 operations in different order."""


def optim(name: str, warmup: int, constant: int = 0, lr: float = LR, min_lr: float = MIN_LR) -> OptimConfig:
    return OptimConfig(
        name="adamw",
        lr=lr,
        weight_decay=0.0,
        betas=[0.9, 0.98],
        eps=1e-8,
        momentum=0.0,
        overlap_grad_sync=False,
        overlap_param_sync=False,
        sched=ScheduleConfig(name, warmup, constant, min_lr),
    )


def ours(config: OptimConfig, max_steps: int, count: int | None = None) -> list[float]:
    return [learning_rate(step, config, max_steps) for step in range(count or max_steps)]


@pytest.fixture(scope="module")
def nemo():
    """NeMo's schedulers by our names; importing NeMo takes seconds."""
    from nemo.core.optim import lr_scheduler

    return {"CosineAnnealing": lr_scheduler.CosineAnnealing, "LinearAnnealing": lr_scheduler.WarmupAnnealing}


def theirs(scheduler, config: OptimConfig, max_steps: int, count: int) -> list[float]:
    """Rates that NeMo sets for the first ``count`` optimizer steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    sched = config.sched
    constant = {"constant_steps": sched.constant_steps} if sched.name == "CosineAnnealing" else {}
    schedule = scheduler(
        optimizer, max_steps=max_steps, min_lr=sched.min_lr, warmup_steps=sched.warmup_steps, **constant
    )
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


COSINE = list(itertools.product([0, 1, 10], [0, 1, 7], [20, 60]))


@pytest.mark.parametrize(("warmup", "constant", "max_steps"), COSINE)
def test_cosine_is_nemos(nemo, warmup, constant, max_steps):
    config, count = optim("CosineAnnealing", warmup, constant), max_steps + 5
    expected = theirs(nemo["CosineAnnealing"], config, max_steps, count)
    assert ours(config, max_steps, count) == pytest.approx(expected, rel=ULPS)


@pytest.mark.parametrize(("warmup", "max_steps"), itertools.product([0, 1, 10], [20, 60]))
def test_linear_is_nemos(nemo, warmup, max_steps):
    config, count = optim("LinearAnnealing", warmup), max_steps + 5
    expected = theirs(nemo["LinearAnnealing"], config, max_steps, count)
    assert ours(config, max_steps, count) == pytest.approx(expected, rel=ULPS)


@pytest.mark.parametrize("name", ["CosineAnnealing", "LinearAnnealing"])
@pytest.mark.parametrize("constant", [0, 5])
def test_end_values(name, constant):
    max_steps, warmup = 50, 10
    rates = ours(optim(name, warmup, constant), max_steps, max_steps + 20)
    assert rates[warmup] == LR, "the peak comes right after the warm-up"
    assert max(rates) == LR
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    end = max_steps - constant
    assert rates[end - 1] > MIN_LR
    assert rates[end:] == pytest.approx([MIN_LR] * (len(rates) - end), rel=ULPS)


def test_linear_halfway():
    rates = ours(optim("LinearAnnealing", 10, 10), 60)
    assert rates[30] == pytest.approx((LR + MIN_LR) / 2, rel=ULPS)


def test_the_first_step_of_a_warm_up_moves():
    """Without constant steps NeMo's warm-up starts above 0; with them it is Megatron's, which starts at 0."""
    assert ours(optim("CosineAnnealing", 9), 60)[0] == pytest.approx(LR / 10, rel=ULPS)
    assert ours(optim("CosineAnnealing", 9, 5), 60)[0] == 0.0


def test_constant():
    assert ours(optim("Constant", 0), 30) == [LR] * 30
    rates = ours(optim("Constant", 4, constant=20), 30)
    assert rates[:5] == pytest.approx([LR * step / 5 for step in range(1, 6)], rel=ULPS)
    assert rates[4:] == [LR] * 26, "constant_steps and min_lr mean nothing here"


def test_min_lr_equal_to_lr_is_flat_after_the_warm_up():
    for name in ("CosineAnnealing", "LinearAnnealing"):
        assert ours(optim(name, 2, 3, min_lr=LR), 20)[2:] == pytest.approx([LR] * 18, rel=ULPS)
