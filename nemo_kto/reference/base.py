"""What every reference policy offers. Not a policy itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from nemo_kto.data.batch import StepBatch
from nemo_kto.gpt.forward import Passes


class Reference(Protocol):
    """A frozen policy that adds its log-probs to a batch. Which one did cannot be told from the result."""

    def score(self, step: StepBatch) -> StepBatch:
        """The same share with ``ref_logps`` and, where KL pairs are used, ``ref_kl_logps`` on the last stage.

        The policy's weights, training mode, gradients and random streams are as before on return, also when it raises.
        """
        ...


def scored(step: StepBatch, passes: Passes, micro_batch_size: int, *, needs_kl: bool) -> StepBatch:
    """The share with the log-probs of the model as it is right now in its reference columns.

    Args:
        step: this rank's share of a global batch.
        passes: of a model that is the reference.
        micro_batch_size: rows per forward.
        needs_kl: whether the mismatched pairs are scored too.
    """
    logps = passes.score([batch.samples for batch in step], micro_batch_size)
    kl_logps: list[Tensor] = []
    if needs_kl:
        kl_logps = passes.score([batch.kl_rows for batch in step], micro_batch_size)
    batches = tuple(
        replace(
            batch,
            ref_logps=logps[i] if logps else None,
            ref_kl_logps=kl_logps[i] if kl_logps else None,
        )
        for i, batch in enumerate(step)
    )
    return replace(step, micro_batches=batches)
