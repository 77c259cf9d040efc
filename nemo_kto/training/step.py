"""The arithmetic of one optimizer step: reference, reference point, gradients. No optimizer, no trainer, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_kto.config.schema import KTOConfig, ModelConfig
from nemo_kto.data.batch import ForwardSize, KTOBatch, StepBatch
from nemo_kto.distributed.collectives import broadcast_floats, reduce_sums
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.gpt.forward import Passes
from nemo_kto.objective.counts import BatchCounts
from nemo_kto.objective.losses import (
    LossSettings,
    kl_partial_sum,
    kto_loss,
    log_ratios,
    reference_point,
    rewards,
)
from nemo_kto.reference.columns import ReferenceColumns
from nemo_kto.training.metrics import SUMS


def loss_settings(kto: KTOConfig) -> LossSettings:
    """The part of ``model.kto`` that the objective needs."""
    return LossSettings(
        beta=kto.ref_policy_kl_penalty,
        desirable_weight=kto.desirable_loss_weight,
        undesirable_weight=kto.undesirable_loss_weight,
        kl_clamp=kto.kl_clamp,
        loss_normalization=kto.loss_normalization,
        loss_type=kto.loss_type,
        preference_weight=kto.preference_loss_weight,
        sft_weight=kto.sft_loss_weight,
        average_log_probs=kto.preference_average_log_probs,
        sft_average_log_probs=kto.sft_average_log_probs,
    )


def forward_size(model: ModelConfig) -> ForwardSize:
    """How many rows a forward without gradient takes."""
    rows = model.kto.log_prob_forward_micro_batch_size
    tokens = rows * model.data.seq_length if model.data.packing else None
    return ForwardSize(rows, tokens, model.tensor_model_parallel_size if model.sequence_parallel else 1)


def score_size(model: ModelConfig) -> ForwardSize | None:
    """The same, but None where it is that of training: micro-batches are then scored as they are trained on."""
    same = model.kto.log_prob_forward_micro_batch_size == model.micro_batch_size
    return None if same else forward_size(model)


@dataclass(frozen=True)
class KTOStep:
    """Runs the passes of a KTO step in order; see section "one training step" of the README.

    Attributes:
        passes: the policy's passes.
        reference: adds reference log-probs to a batch.
        settings: the objective.
        groups: the parallel layout.
        score_size: of a forward of the policy's no-gradient passes; None repeats the training pass's micro-batches.
    """

    passes: Passes
    reference: ReferenceColumns
    settings: LossSettings
    groups: ParallelGroups
    score_size: ForwardSize | None

    def train(self, step: StepBatch) -> dict[str, float]:
        """Accumulate the gradient of the global loss over this rank's share.

        Returns:
            Totals over the global batch by the names of ``SUMS``, equal on every rank.
        """
        scored = self.reference.score(step)
        kl_ref = self._reference_point(scored)

        def objective(policy_logps: Tensor, batch: KTOBatch) -> tuple[Tensor, dict[str, Tensor]]:
            return self._loss_and_sums(policy_logps, batch, kl_ref, step.counts)

        sums = self.passes.train(scored.micro_batches, objective)
        return self._share(sums)

    @torch.no_grad()
    def evaluate(self, step: StepBatch, loss_counts: BatchCounts) -> dict[str, float]:
        """The same sums without gradient.

        Args:
            step: a validation batch; its pairs and reference point are its own.
            loss_counts: counts of the whole validation set, so that the ``loss`` of all batches adds up to the loss
                pooled by class.
        """
        scored = self.reference.score(step)
        kl_ref = self._reference_point(scored)
        logps = self.passes.score([b.samples for b in scored], self.score_size)
        sums: dict[str, Tensor] = {}
        for policy_logps, batch in zip(logps, scored, strict=bool(logps)):
            loss, rows = self._loss_and_sums(policy_logps, batch, kl_ref, loss_counts)
            for name, value in {"loss": loss, **rows}.items():
                sums[name] = sums[name] + value if name in sums else value
        return self._share(sums)

    def _reference_point(self, step: StepBatch) -> Tensor:
        """KL_ref of the global batch: the pairs' log-probs, one all-reduce, one clamp. 0 off the last stage."""
        zero = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        if not self.settings.needs_kl:
            return zero
        logps = self.passes.score([b.kl_rows for b in step], self.score_size)
        if not self.groups.is_last_stage:
            return zero
        partial = zero
        for policy_logps, batch in zip(logps, step, strict=True):
            assert batch.ref_kl_logps is not None
            ratios = log_ratios(policy_logps, batch.ref_kl_logps, batch.kl_rows.num_response_tokens, self.settings)
            partial = partial + kl_partial_sum(ratios, batch.has_partner, self.settings)
        total = reduce_sums({"kl": partial}, self.groups.dp, self.groups.device)["kl"]
        return reference_point(zero + total, step.counts, self.settings)

    def _loss_and_sums(
        self, policy_logps: Tensor, batch: KTOBatch, kl_ref: Tensor, counts: BatchCounts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.ref_logps is not None
        tokens = batch.samples.num_response_tokens
        loss = kto_loss(policy_logps, batch.ref_logps, tokens, batch.desirable, kl_ref, counts, self.settings)
        reward = rewards(log_ratios(policy_logps, batch.ref_logps, tokens, self.settings), self.settings)
        logps, desirable = policy_logps.detach(), batch.desirable
        sums = {
            "rewards_desirable": reward[desirable].sum(),
            "rewards_undesirable": reward[~desirable].sum(),
            "logps_desirable": logps[desirable].sum(),
            "logps_undesirable": logps[~desirable].sum(),
            "correct": ((reward > kl_ref) == desirable).double().sum(),
            "kl_ref": kl_ref * batch.size,
        }
        return loss, sums

    def _share(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Add over data-parallel ranks on the last stage, then tell the other stages."""
        totals: dict[str, float] | None = None
        if self.groups.is_last_stage:
            local = {name: sums.get(name, 0.0) for name in SUMS}
            totals = reduce_sums(local, self.groups.dp, self.groups.device)
        return broadcast_floats(totals, SUMS, self.groups.last_stage_rank, self.groups.pp, self.groups.device)
