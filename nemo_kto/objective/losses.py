"""The KTO losses on one micro-batch's sequence log-probabilities. Not for reducing anything over ranks.

Every function returns *addends*: their sum over all micro-batches of all data-parallel ranks is the quantity of the
whole global batch, because every denominator comes from :class:`BatchCounts`. Sequence log-probabilities arrive in
float64 (nats summed over response tokens); the dtype of the inputs is kept throughout.

Sources: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", equations 7 and 8;
D'Oosterlinck et al. 2024, "Anchored Preference Optimization", for ``apo_zero_unpaired``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_kto.objective.counts import BatchCounts


@dataclass(frozen=True)
class LossSettings:
    """The choices of ``model.kto`` that change the objective.

    Attributes:
        beta: ``ref_policy_kl_penalty``, > 0.
        desirable_weight: weight of desirable rows.
        undesirable_weight: weight of undesirable rows.
        kl_clamp: ``per_sample`` (mean of clamped) or ``batch_mean`` (clamp of the mean).
        loss_normalization: ``per_class`` (mean over each class) or ``per_batch`` (mean over all rows).
        loss_type: ``kto`` or ``apo_zero_unpaired``.
        preference_weight: weight of the KTO loss.
        sft_weight: weight of the negative log-likelihood of desirable rows.
        average_log_probs: divide log-ratios by their numbers of response tokens.
        sft_average_log_probs: divide each row's negative log-likelihood by its number of response tokens.
    """

    beta: float
    desirable_weight: float
    undesirable_weight: float
    kl_clamp: str
    loss_normalization: str
    loss_type: str
    preference_weight: float
    sft_weight: float
    average_log_probs: bool
    sft_average_log_probs: bool

    @property
    def needs_kl(self) -> bool:
        """Whether a reference point must be estimated from mismatched pairs."""
        return self.loss_type != "apo_zero_unpaired"

    @property
    def normalizes_per_class(self) -> bool:
        """Whether each class is averaged on its own. apo_zero_unpaired has one denominator whatever the key says."""
        return self.needs_kl and self.loss_normalization == "per_class"


def log_ratios(policy_logps: Tensor, ref_logps: Tensor, num_tokens: Tensor, settings: LossSettings) -> Tensor:
    """Log-ratio of policy to reference of each row: h_i of (x_i, y_i), k_i of (x_i, y_m(i)).

    Args:
        policy_logps: [B] float, nats summed over response tokens. Gradient flows.
        ref_logps: [B] float, the same under the reference. No gradient.
        num_tokens: [B] int64, response tokens per row. A row without any has the ratio 0.
        settings: the objective.

    Returns:
        [B] in the dtype of ``policy_logps``: nats, or nats per token with ``average_log_probs``.
    """
    ratios = policy_logps - ref_logps.detach()
    return _per_token(ratios, num_tokens) if settings.average_log_probs else ratios


def kl_partial_sum(kl_log_ratios: Tensor, has_partner: Tensor, settings: LossSettings) -> Tensor:
    """This micro-batch's addend of the sum behind the reference point. No gradient.

    Args:
        kl_log_ratios: [B] float, k_i in nats.
        has_partner: [B] bool, rows that count.
        settings: the objective.

    Returns:
        Scalar: sum of max(0, beta k_i) under ``per_sample``, of beta k_i under ``batch_mean``.
    """
    terms = settings.beta * kl_log_ratios.detach()
    if settings.kl_clamp == "per_sample":
        terms = terms.clamp(min=0)
    return terms.masked_fill(~has_partner, 0).sum()


def reference_point(partial_sum: Tensor, counts: BatchCounts, settings: LossSettings) -> Tensor:
    """KL_ref, the reward that counts as neither gain nor loss: one number per optimizer step. No gradient.

    Args:
        partial_sum: scalar, :func:`kl_partial_sum` already summed over the whole global batch.
        counts: of the global batch.
        settings: the objective.

    Returns:
        Scalar >= 0 in units of reward (beta times nats); 0 without pairs and for ``apo_zero_unpaired``.
    """
    if not settings.needs_kl or counts.num_kl_pairs == 0:
        return torch.zeros_like(partial_sum)
    # Only here is the mean global, so only here may batch_mean clamp: ranks at -1 and +1 must meet at 0.
    return (partial_sum.detach() / counts.num_kl_pairs).clamp(min=0)


def rewards(log_ratios: Tensor, settings: LossSettings) -> Tensor:
    """[B] implied rewards r_i = beta h_i, detached."""
    return settings.beta * log_ratios.detach()


def preference_loss(
    log_ratios: Tensor, desirable: Tensor, kl_ref: Tensor, counts: BatchCounts, settings: LossSettings
) -> Tensor:
    """This micro-batch's addend of L_kto.

    Args:
        log_ratios: [B] float, h_i in nats. Gradient flows.
        desirable: [B] bool.
        kl_ref: scalar, :func:`reference_point`. No gradient; ``apo_zero_unpaired`` does not look at it.
        counts: of the global batch.
        settings: the objective.

    Returns:
        Scalar; a class without rows adds 0.
    """
    anchor = kl_ref.detach() if settings.needs_kl else torch.zeros_like(kl_ref)
    sign = desirable.to(log_ratios.dtype) * 2 - 1
    # 1 - sigmoid(z) is sigmoid(-z), which does not cancel where z is large.
    losses = torch.sigmoid(-sign * (settings.beta * log_ratios - anchor))
    return (_coefficients(losses, desirable, counts, settings) * losses).sum()


def sft_loss(
    policy_logps: Tensor, num_tokens: Tensor, desirable: Tensor, counts: BatchCounts, settings: LossSettings
) -> Tensor:
    """This micro-batch's addend of the mean negative log-likelihood of desirable rows.

    Args:
        policy_logps: [B] float, nats summed over response tokens. Gradient flows.
        num_tokens: [B] int64, response tokens per row.
        desirable: [B] bool.
        counts: of the global batch.
        settings: the objective.

    Returns:
        Scalar: nats per row, or nats per token with ``sft_average_log_probs``; 0 without desirable rows.
    """
    nll = -(_per_token(policy_logps, num_tokens) if settings.sft_average_log_probs else policy_logps)
    return nll.masked_fill(~desirable, 0).sum() / max(counts.num_desirable, 1)


def kto_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    num_tokens: Tensor,
    desirable: Tensor,
    kl_ref: Tensor,
    counts: BatchCounts,
    settings: LossSettings,
) -> Tensor:
    """This micro-batch's addend of the global loss, preference and SFT terms weighted.

    Args:
        policy_logps: [B] float, nats summed over response tokens. The only argument that gradient flows to.
        ref_logps: [B] float, the same under the reference.
        num_tokens: [B] int64, response tokens per row.
        desirable: [B] bool.
        kl_ref: scalar, :func:`reference_point`.
        counts: of the global batch.
        settings: the objective.

    Returns:
        Scalar in the dtype of ``policy_logps``.
    """
    ratios = log_ratios(policy_logps, ref_logps, num_tokens, settings)
    loss = settings.preference_weight * preference_loss(ratios, desirable, kl_ref, counts, settings)
    if settings.sft_weight:
        loss = loss + settings.sft_weight * sft_loss(policy_logps, num_tokens, desirable, counts, settings)
    return loss


def _per_token(sums: Tensor, num_tokens: Tensor) -> Tensor:
    """[B] sums over their numbers of tokens; a sum over none is 0 and stays 0."""
    return sums / num_tokens.clamp(min=1)


def _coefficients(losses: Tensor, desirable: Tensor, counts: BatchCounts, settings: LossSettings) -> Tensor:
    """[B] in the dtype of ``losses``: what each row's loss is multiplied by, w / N_class or w / N."""
    num_desirable, num_undesirable = counts.num_samples, counts.num_samples
    if settings.normalizes_per_class:
        # An absent class has no row to multiply, so its denominator must only not be 0.
        num_desirable, num_undesirable = max(counts.num_desirable, 1), max(counts.num_undesirable, 1)
    undesirable_everywhere = torch.full_like(losses, settings.undesirable_weight / num_undesirable)
    return undesirable_everywhere.masked_fill(desirable, settings.desirable_weight / num_desirable)
