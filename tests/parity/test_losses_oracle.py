"""The losses against one explicit loop per sample, written from section 1 of the design in plain float64 numbers."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from nemo_kto.objective.counts import BatchCounts
from nemo_kto.objective.losses import LossSettings, kl_partial_sum, kto_loss, log_ratios, reference_point

# Both sides are float64 and differ in the order of a few dozen additions of terms of order 1.
TOLERANCE = {"rel": 1e-12, "abs": 1e-12}

ALL_SETTINGS = [
    LossSettings(
        beta=0.3,
        desirable_weight=1.25,
        undesirable_weight=0.75,
        kl_clamp=clamp,
        loss_normalization=normalization,
        loss_type=loss_type,
        preference_weight=preference,
        sft_weight=sft,
        average_log_probs=average,
        sft_average_log_probs=sft_average,
    )
    for clamp, normalization, loss_type, (preference, sft), average, sft_average in itertools.product(
        ["per_sample", "batch_mean"],
        ["per_class", "per_batch"],
        ["kto", "apo_zero_unpaired"],
        [(1.0, 0.0), (0.7, 0.4)],
        [False, True],
        [False, True],
    )
]


@dataclass
class Batch:
    policy: torch.Tensor
    ref: torch.Tensor
    tokens: torch.Tensor
    kl_policy: torch.Tensor
    kl_ref: torch.Tensor
    kl_tokens: torch.Tensor
    desirable: torch.Tensor
    has_partner: torch.Tensor

    def rows(self, start: int, stop: int) -> Batch:
        return Batch(**{name: value[start:stop] for name, value in vars(self).items()})

    @property
    def counts(self) -> BatchCounts:
        good = int(self.desirable.sum())
        return BatchCounts(len(self.desirable), good, len(self.desirable) - good, int(self.has_partner.sum()), 0)


def make_batch(size: int = 9, seed: int = 0, scale: float = 5.0, labels: str = "mixed") -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    ref, kl_ref = -80 + 20 * normal(), -90 + 20 * normal()
    desirable = {"mixed": normal() > 0, "all": torch.ones(size) > 0, "none": torch.zeros(size) > 0}[labels]
    kl_tokens, has_partner = torch.randint(1, 30, (size,), generator=generator), torch.ones(size) > 0
    kl_policy = kl_ref + scale * normal()
    has_partner[2], kl_tokens[2], kl_policy[2], kl_ref[2] = False, 0, 0.0, 0.0
    tokens = torch.randint(1, 30, (size,), generator=generator)
    return Batch(ref + scale * normal(), ref, tokens, kl_policy, kl_ref, kl_tokens, desirable, has_partner)


def loop_sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def loop_reference_point(batch: Batch, s: LossSettings) -> float:
    """KL_ref as the table says, sample by sample."""
    if s.loss_type == "apo_zero_unpaired":
        return 0.0
    terms = []
    for policy, ref, tokens, has_partner in zip(
        batch.kl_policy.tolist(),
        batch.kl_ref.tolist(),
        batch.kl_tokens.tolist(),
        batch.has_partner.tolist(),
        strict=True,
    ):
        if has_partner:
            terms.append((policy - ref) / tokens if s.average_log_probs else policy - ref)
    if not terms:
        return 0.0
    if s.kl_clamp == "per_sample":
        return sum(max(0.0, s.beta * k) for k in terms) / len(terms)
    return max(0.0, s.beta * sum(terms) / len(terms))


def loop_loss(batch: Batch, s: LossSettings) -> float:
    """L as the table says, sample by sample."""
    kl_ref = loop_reference_point(batch, s)
    desirable_losses, undesirable_losses, nlls = [], [], []
    for policy, ref, tokens, desirable in zip(
        batch.policy.tolist(), batch.ref.tolist(), batch.tokens.tolist(), batch.desirable.tolist(), strict=True
    ):
        r = s.beta * ((policy - ref) / tokens if s.average_log_probs else policy - ref)
        if desirable:
            desirable_losses.append(s.desirable_weight * (1 - loop_sigmoid(r - kl_ref)))
            nlls.append(-policy / tokens if s.sft_average_log_probs else -policy)
        else:
            undesirable_losses.append(s.undesirable_weight * (1 - loop_sigmoid(kl_ref - r)))
    if s.loss_type == "kto" and s.loss_normalization == "per_class":
        total = sum(sum(losses) / len(losses) for losses in (desirable_losses, undesirable_losses) if losses)
    else:
        total = sum(desirable_losses + undesirable_losses) / len(batch.policy)
    return s.preference_weight * total + s.sft_weight * (sum(nlls) / len(nlls) if nlls else 0.0)


def package_reference_point(batch: Batch, s: LossSettings, cuts: list[int]) -> torch.Tensor:
    partial = torch.zeros((), dtype=torch.float64)
    for start, stop in itertools.pairwise(cuts):
        part = batch.rows(start, stop)
        ratios = log_ratios(part.kl_policy, part.kl_ref, part.kl_tokens, s)
        partial = partial + kl_partial_sum(ratios, part.has_partner, s)
    return reference_point(partial, batch.counts, s)


def package_loss(batch: Batch, s: LossSettings, cuts: list[int] | None = None) -> torch.Tensor:
    cuts = cuts or [0, len(batch.policy)]
    kl_ref = package_reference_point(batch, s, cuts)
    loss = torch.zeros((), dtype=torch.float64)
    for start, stop in itertools.pairwise(cuts):
        part = batch.rows(start, stop)
        loss = loss + kto_loss(part.policy, part.ref, part.tokens, part.desirable, kl_ref, batch.counts, s)
    return loss


@pytest.mark.parametrize("labels", ["mixed", "all", "none"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 5.0])
def test_every_combination(labels: str, scale: float):
    for seed, settings in enumerate(ALL_SETTINGS):
        batch = make_batch(seed=seed, scale=scale, labels=labels)
        expected_point, expected = loop_reference_point(batch, settings), loop_loss(batch, settings)
        got_point = package_reference_point(batch, settings, [0, len(batch.policy)])
        assert got_point.item() == pytest.approx(expected_point, **TOLERANCE), settings
        assert package_loss(batch, settings).item() == pytest.approx(expected, **TOLERANCE), settings


def test_addends_of_any_partition_make_the_global_loss():
    for seed, settings in enumerate(ALL_SETTINGS):
        batch = make_batch(size=8, seed=seed)
        whole = package_loss(batch, settings).item()
        for cuts in ([0, 4, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 3, 3, 8], [0, 7, 8]):
            assert package_loss(batch, settings, cuts).item() == pytest.approx(whole, **TOLERANCE), settings


def test_gradients_of_any_partition_add_up():
    for seed, settings in enumerate(ALL_SETTINGS):
        batch = make_batch(size=8, seed=seed)
        batch.policy.requires_grad_()
        (whole,) = torch.autograd.grad(package_loss(batch, settings), batch.policy)
        (parts,) = torch.autograd.grad(package_loss(batch, settings, [0, 1, 5, 8]), batch.policy)
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-15)  # float64 rounding of equal formulas


def test_gradcheck():
    # Only the policy's own rows: the reference point is a constant of the step, by definition.
    for seed, settings in enumerate(ALL_SETTINGS):
        batch = make_batch(size=5, seed=seed, scale=1.0)
        kl_ref = package_reference_point(batch, settings, [0, 5])

        def loss(policy: torch.Tensor, batch=batch, kl_ref=kl_ref, settings=settings) -> torch.Tensor:
            return kto_loss(policy, batch.ref, batch.tokens, batch.desirable, kl_ref, batch.counts, settings)

        # gradcheck's defaults for float64: central differences at 1e-6 are good to about 1e-8 here.
        assert torch.autograd.gradcheck(loss, batch.policy.clone().requires_grad_())


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_log_probs(extreme: float):
    for settings in ALL_SETTINGS:
        batch = make_batch(seed=3)
        batch.policy = batch.ref + extreme
        batch.kl_policy = batch.kl_ref + abs(extreme) * batch.has_partner
        batch.policy.requires_grad_()
        loss = package_loss(batch, settings)
        assert loss.item() == pytest.approx(loop_loss(batch, settings), **TOLERANCE)
        (grad,) = torch.autograd.grad(loss, batch.policy)
        assert bool(torch.isfinite(grad).all())


def test_batch_without_any_pair():
    for settings in ALL_SETTINGS:
        batch = make_batch(seed=4)
        batch.has_partner = torch.zeros_like(batch.has_partner)
        assert package_reference_point(batch, settings, [0, 9]).item() == 0.0
        assert package_loss(batch, settings).item() == pytest.approx(loop_loss(batch, settings), **TOLERANCE)
