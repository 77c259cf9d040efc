"""The KTO losses on numbers that a reader can check by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from nemo_kto.objective.counts import BatchCounts
from nemo_kto.objective.losses import (
    LossSettings,
    kl_partial_sum,
    kto_loss,
    log_ratios,
    preference_loss,
    reference_point,
    rewards,
    sft_loss,
)

# Float64 throughout; what is left is the rounding of a handful of operations.
EXACT = {"abs": 1e-14, "rel": 1e-14}

SETTINGS = LossSettings(
    beta=0.5,
    desirable_weight=1.0,
    undesirable_weight=1.0,
    kl_clamp="per_sample",
    loss_normalization="per_class",
    loss_type="kto",
    preference_weight=1.0,
    sft_weight=0.0,
    average_log_probs=False,
    sft_average_log_probs=False,
)
BATCH_MEAN = replace(SETTINGS, kl_clamp="batch_mean")
PER_BATCH = replace(SETTINGS, loss_normalization="per_batch")
APO = replace(SETTINGS, loss_type="apo_zero_unpaired")


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def counts(desirable: int, undesirable: int, pairs: int | None = None) -> BatchCounts:
    total = desirable + undesirable
    return BatchCounts(total, desirable, undesirable, total if pairs is None else pairs, num_tokens=0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_log_ratio_is_a_sum_in_nats_or_a_mean_per_token():
    policy, ref, tokens = f64(-10, -30, 0), f64(-12, -27, 0), torch.tensor([4, 3, 0])
    assert log_ratios(policy, ref, tokens, SETTINGS).tolist() == [2.0, -3.0, 0.0]
    averaged = log_ratios(policy, ref, tokens, replace(SETTINGS, average_log_probs=True))
    assert averaged.tolist() == [0.5, -1.0, 0.0]


def test_rewards_are_beta_times_nats_without_gradient():
    ratio = f64(2, -3).requires_grad_()
    assert rewards(ratio, SETTINGS).tolist() == [1.0, -1.5]
    assert not rewards(ratio, SETTINGS).requires_grad


def test_reference_point_clamps_each_sample_or_the_mean():
    k, has_partner = f64(4, -2, 100), torch.tensor([True, True, False])
    per_sample = kl_partial_sum(k, has_partner, SETTINGS)
    batch_mean = kl_partial_sum(k, has_partner, BATCH_MEAN)
    assert per_sample.item() == 0.5 * 4
    assert batch_mean.item() == 0.5 * (4 - 2)
    of_three = counts(2, 1, pairs=2)
    assert reference_point(per_sample, of_three, SETTINGS).item() == 1.0
    assert reference_point(batch_mean, of_three, BATCH_MEAN).item() == 0.5
    assert reference_point(scalar(-3), of_three, BATCH_MEAN).item() == 0.0


def test_reference_point_is_zero_without_pairs_and_for_apo():
    assert reference_point(scalar(0), counts(1, 1, pairs=0), SETTINGS).item() == 0.0
    assert reference_point(scalar(5), counts(1, 1), APO).item() == 0.0
    assert SETTINGS.needs_kl
    assert not APO.needs_kl


def test_a_row_without_partner_adds_nothing_even_if_it_is_nan():
    k, has_partner = f64(4, math.nan), torch.tensor([True, False])
    assert kl_partial_sum(k, has_partner, SETTINGS).item() == 2.0


def test_no_gradient_reaches_the_reference_point():
    k = f64(4, 2).requires_grad_()
    partial = kl_partial_sum(k, torch.tensor([True, True]), SETTINGS)
    assert not reference_point(partial, counts(1, 1), SETTINGS).requires_grad


def test_preference_loss_by_hand():
    ratio, desirable, kl_ref = f64(2, 4, -2), torch.tensor([True, True, False]), scalar(0.5)
    weighted = replace(SETTINGS, desirable_weight=3.0, undesirable_weight=2.0)
    # r = 1, 2, -1; r - KL_ref = 0.5, 1.5, -1.5
    by_class = 3 / 2 * (1 - sigmoid(0.5) + 1 - sigmoid(1.5)) + 2 / 1 * (1 - sigmoid(1.5))
    by_batch = (3 * (1 - sigmoid(0.5)) + 3 * (1 - sigmoid(1.5)) + 2 * (1 - sigmoid(1.5))) / 3
    total = counts(2, 1)
    assert preference_loss(ratio, desirable, kl_ref, total, weighted).item() == pytest.approx(by_class, **EXACT)
    per_batch = replace(weighted, loss_normalization="per_batch")
    assert preference_loss(ratio, desirable, kl_ref, total, per_batch).item() == pytest.approx(by_batch, **EXACT)


@pytest.mark.parametrize("normalization", ["per_class", "per_batch"])
def test_apo_zero_ignores_reference_point_and_normalization(normalization: str):
    settings = replace(APO, loss_normalization=normalization, undesirable_weight=2.0)
    loss = preference_loss(f64(2, 4, -2), torch.tensor([True, True, False]), scalar(7), counts(2, 1), settings)
    assert loss.item() == pytest.approx((1 - sigmoid(1) + 1 - sigmoid(2) + 2 * sigmoid(-1)) / 3, **EXACT)


def test_sft_loss_is_the_mean_over_desirable_rows_only():
    policy, tokens, desirable = f64(-6, -8, -99), torch.tensor([2, 8, 3]), torch.tensor([True, True, False])
    assert sft_loss(policy, tokens, desirable, counts(2, 1), SETTINGS).item() == 7.0
    averaged = replace(SETTINGS, sft_average_log_probs=True)
    assert sft_loss(policy, tokens, desirable, counts(2, 1), averaged).item() == 2.0


def test_sft_loss_without_desirable_rows_is_zero_and_backpropagates():
    policy = f64(-6, -8).requires_grad_()
    loss = sft_loss(policy, torch.tensor([2, 8]), torch.tensor([False, False]), counts(0, 2), SETTINGS)
    loss.backward()
    assert loss.item() == 0.0
    assert policy.grad is not None
    assert policy.grad.tolist() == [0.0, 0.0]


def test_kto_loss_weighs_both_terms_and_sends_gradient_to_the_policy_only():
    policy, ref = f64(-6, -8).requires_grad_(), f64(-7, -6).requires_grad_()
    tokens, desirable = torch.tensor([2, 4]), torch.tensor([True, False])
    settings = replace(SETTINGS, preference_weight=2.0, sft_weight=0.25)
    kl_ref = scalar(0.5).requires_grad_()
    loss = kto_loss(policy, ref, tokens, desirable, kl_ref, counts(1, 1), settings)
    expected = 2 * (1 - sigmoid(0.5 - 0.5) + 1 - sigmoid(0.5 + 1.0)) + 0.25 * 6
    assert loss.item() == pytest.approx(expected, **EXACT)
    loss.backward()
    assert ref.grad is None
    assert kl_ref.grad is None
    # d/dh (1 - sigmoid(beta h - KL)) = -beta s (1 - s), with s = sigmoid of the signed margin.
    slope_0, slope_1 = sigmoid(0) * (1 - sigmoid(0)), sigmoid(1.5) * (1 - sigmoid(1.5))
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-2 * 0.5 * slope_0 - 0.25, 2 * 0.5 * slope_1], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype):
    policy, ref = torch.tensor([-1.0, -2.0], dtype=dtype), torch.tensor([-1.5, -1.0], dtype=dtype)
    tokens, desirable = torch.tensor([1, 2]), torch.tensor([True, False])
    settings = replace(SETTINGS, sft_weight=1.0, average_log_probs=True, sft_average_log_probs=True)
    ratio = log_ratios(policy, ref, tokens, settings)
    partial = kl_partial_sum(ratio, desirable, settings)
    kl_ref = reference_point(partial, counts(1, 1), settings)
    loss = kto_loss(policy, ref, tokens, desirable, kl_ref, counts(1, 1), settings)
    assert [t.dtype for t in (ratio, partial, kl_ref, loss, rewards(ratio, settings))] == [dtype] * 5


@pytest.mark.parametrize(("desirable", "undesirable"), [(3, 5), (5, 3), (1, 7)])
def test_step_zero(desirable: int, undesirable: int):
    size = desirable + undesirable
    logps = torch.linspace(-300, -5, size, dtype=torch.float64)
    labels = torch.tensor([True] * desirable + [False] * undesirable)
    tokens, total = torch.full((size,), 10), counts(desirable, undesirable)
    for settings, expected in [
        (SETTINGS, (1.5 + 0.75) / 2),
        (PER_BATCH, (1.5 * desirable + 0.75 * undesirable) / (2 * size)),
    ]:
        weighted = replace(settings, desirable_weight=1.5, undesirable_weight=0.75)
        zero = logps - logps
        kl_ref = reference_point(kl_partial_sum(zero, labels | True, weighted), total, weighted)
        assert kl_ref.item() == 0.0
        loss = kto_loss(logps, logps, tokens, labels, kl_ref, total, weighted)
        assert loss.item() == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize("all_desirable", [True, False])
def test_a_single_class_gives_its_own_mean(all_desirable: bool):
    ratio, labels = f64(2, -2).requires_grad_(), torch.tensor([all_desirable] * 2)
    total = counts(2, 0) if all_desirable else counts(0, 2)
    loss = preference_loss(ratio, labels, scalar(0), total, SETTINGS)
    loss.backward()
    assert loss.item() == pytest.approx((sigmoid(1) + sigmoid(-1)) / 2, **EXACT)
    assert ratio.grad is not None
    assert bool(torch.isfinite(ratio.grad).all())


@pytest.mark.parametrize("h", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_stay_finite(h: float, dtype: torch.dtype):
    policy, ref = torch.tensor([h, h], dtype=dtype).requires_grad_(), torch.zeros(2, dtype=dtype)
    labels, tokens = torch.tensor([True, False]), torch.tensor([5, 5])
    kl_ref = torch.tensor(1e4, dtype=dtype)
    for settings in (SETTINGS, PER_BATCH, APO, replace(SETTINGS, sft_weight=1.0)):
        (grad,) = torch.autograd.grad(kto_loss(policy, ref, tokens, labels, kl_ref, counts(1, 1), settings), policy)
        assert bool(torch.isfinite(grad).all())
