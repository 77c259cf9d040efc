"""From rows that a reference scores to the reference columns of a batch. Knows no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from torch import Tensor

from nemo_kto.data.batch import Rows, StepBatch, regroup, ungroup
from nemo_kto.reference.base import Reference


@dataclass(frozen=True)
class _Columns:
    """Of one step, [B_i] float64 nats per micro-batch: of samples and of pairs. Empty where there are none."""

    logps: list[Tensor]
    kl_logps: list[Tensor]


class ReferenceColumns:
    """Adds a reference's log-probs to batches.

    A batch of training is scored together with the steps that it brings along (``upcoming``). Their columns are kept
    under their step numbers until they come; batches without a number (validation) leave what is kept alone. The
    reference does not change and rows are scored as they would be by themselves, so which steps were scored together
    cannot be told from the numbers.

    Samples are grouped for the forward apart from pairs, and so are the steps, as the policy's own passes group them:
    where both policies are one, both passes then see equal tensors, and log-ratios are exactly 0.

    Args:
        reference: the frozen policy.
        micro_batch_size: rows per forward.
        needs_kl: whether the mismatched pairs are scored too.
    """

    def __init__(self, reference: Reference, *, micro_batch_size: int, needs_kl: bool) -> None:
        self._reference = reference
        self._micro_batch_size = micro_batch_size
        self._needs_kl = needs_kl
        self._ahead: dict[int, _Columns] = {}

    def score(self, step: StepBatch) -> StepBatch:
        """The same share with ``ref_logps`` and, where KL pairs are used, ``ref_kl_logps`` on the last stage.

        Samples and pairs, and those of all upcoming steps, take one call of the reference, or none where they have
        been scored before. The result has no upcoming steps.
        """
        columns = None if step.number is None else self._ahead.pop(step.number, None)
        if columns is None:
            columns, *later = self._columns([step, *step.upcoming])
            if step.number is not None:
                self._ahead = {_number(s): ahead for s, ahead in zip(step.upcoming, later, strict=True)}
        return _with_columns(step, columns)

    def _columns(self, steps: Sequence[StepBatch]) -> list[_Columns]:
        parts = [[batch.samples for batch in step] for step in steps]
        if self._needs_kl:
            parts += [[batch.kl_rows for batch in step] for step in steps]
        found = self._log_probs(parts)
        kl_logps = found[len(steps) :] or [[] for _ in steps]
        return [_Columns(*pair) for pair in zip(found[: len(steps)], kl_logps, strict=True)]

    def _log_probs(self, parts: list[list[Rows]]) -> list[list[Tensor]]:
        """Log-probs of several lists of rows, each grouped for itself; empty lists off the last stage."""
        grouped = [regroup(rows, self._micro_batch_size) for rows in parts]
        values = iter(self._reference.log_probs([rows for groups in grouped for rows in groups]))
        found = [list(islice(values, len(groups))) for groups in grouped]
        return [ungroup(own, rows) if own else [] for own, rows in zip(found, parts, strict=True)]


def _number(step: StepBatch) -> int:
    assert step.number is not None, "a step that is looked ahead at has a number"
    return step.number


def _with_columns(step: StepBatch, columns: _Columns) -> StepBatch:
    size = len(step.micro_batches)
    batches = tuple(
        replace(batch, ref_logps=logps, ref_kl_logps=kl_logps)
        for batch, logps, kl_logps in zip(
            step, columns.logps or [None] * size, columns.kl_logps or [None] * size, strict=True
        )
    )
    return replace(step, micro_batches=batches, upcoming=())
