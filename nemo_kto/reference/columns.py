"""From rows that a reference scores to the reference columns of a batch. Knows no weights."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from torch import Tensor

from nemo_kto.data.batch import ForwardSize, Rows, StepBatch, regroup, ungroup
from nemo_kto.reference.base import Reference


class ReferenceColumns:
    """Adds a reference's log-probs to batches.

    Samples are grouped for the forward apart from pairs, and so are the steps, as the policy's own passes group them:
    where both policies are one, both passes then see equal tensors, and log-ratios are exactly 0.

    Args:
        reference: the frozen policy.
        size: of a forward; None: the entries as they are.
        needs_kl: whether the mismatched pairs are scored too.
    """

    def __init__(self, reference: Reference, *, size: ForwardSize | None, needs_kl: bool) -> None:
        self._reference = reference
        self._size = size
        self._needs_kl = needs_kl

    def score(self, step: StepBatch) -> StepBatch:
        """The same share with ``ref_logps`` and, where KL pairs are used, ``ref_kl_logps`` on the last stage.

        Samples and pairs take one call of the reference.
        """
        parts = [[batch.samples for batch in step]]
        if self._needs_kl:
            parts.append([batch.kl_rows for batch in step])
        logps, *kl_logps = self._log_probs(parts)
        return _with_columns(step, logps, kl_logps[0] if kl_logps else [])

    def _log_probs(self, parts: list[list[Rows]]) -> list[list[Tensor]]:
        """Log-probs of several lists of rows, each grouped for itself; empty lists off the last stage."""
        grouped = [regroup(rows, self._size) for rows in parts]
        values = iter(self._reference.log_probs([rows for groups in grouped for rows in groups]))
        found = [list(islice(values, len(groups))) for groups in grouped]
        return [ungroup(own, rows) if own else [] for own, rows in zip(found, parts, strict=True)]


def _with_columns(step: StepBatch, logps: list[Tensor], kl_logps: list[Tensor]) -> StepBatch:
    batches = tuple(
        replace(
            batch,
            ref_logps=logps[i] if logps else None,
            ref_kl_logps=kl_logps[i] if kl_logps else None,
        )
        for i, batch in enumerate(step)
    )
    return replace(step, micro_batches=batches)
