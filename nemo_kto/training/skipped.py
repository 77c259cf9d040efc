"""Steps that were not taken because a loss or gradient was not finite: counted, written down, and in a row the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_kto.errors import TooManySkipsError
from nemo_kto.training.metrics import MetricsFile

logger = logging.getLogger(__name__)

FILE = "skipped.jsonl"
_MOST_NAMED = 16  # records in an error message; the file has all


class SkippedSteps:
    """The skipped steps of a run.

    Args:
        log_dir: the run's directory; :data:`FILE` there gets one line per skipped step.
        most_in_a_row: so many consecutive ones end the run; 0 for no limit.
        records: places of the records of the global batch with which so many consumed samples were reached.
    """

    def __init__(self, log_dir: Path, most_in_a_row: int, records: Callable[[int], list[str]]) -> None:
        self.total = 0
        """Skipped since the run began, over all its resumptions."""
        self._in_a_row = 0
        self._most_in_a_row = most_in_a_row
        self._records = records
        self._path = log_dir / FILE
        self._file = MetricsFile(self._path)

    @property
    def in_a_row(self) -> int:
        """How many of the newest steps were skipped, without one between them that was taken."""
        return self._in_a_row

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps of this."""
        return {"skipped_steps": self.total, "consecutive_skips": self._in_a_row}

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`; a checkpoint without it is of a version that stopped where this one skips."""
        self.total = checkpoint.get("skipped_steps", 0)
        self._in_a_row = checkpoint.get("consecutive_skips", 0)

    def go_back_to(self, step: int) -> None:
        """Drop the lines of later steps, which a run that resumes at ``step`` writes again. On one rank."""
        self._file.go_back_to(step)

    def taken(self, steps: int) -> int:
        """How many of ``steps`` moved the weights: where the run stands in its learning-rate schedule."""
        return max(0, steps - self.total)  # of the steps of another batch size there may be fewer

    def count(self, *, taken: bool) -> None:
        """Count one step."""
        self._in_a_row = 0 if taken else self._in_a_row + 1
        self.total += not taken

    def report(self, step: int, consumed_samples: int, loss: float, grad_norm: float, *, writes: bool) -> None:
        """Write down the step that has just been skipped, if it was. All ranks call it.

        Args:
            step: its number, as in metrics.jsonl.
            consumed_samples: with this step's.
            loss: of the global batch.
            grad_norm: before clipping.
            writes: whether this rank writes files.

        Raises:
            TooManySkipsError: on all ranks: there were too many in a row.
        """
        too_many = 0 < self._most_in_a_row <= self._in_a_row
        if not self._in_a_row or not (writes or too_many):
            return
        reason, records = _reason(loss, grad_norm), self._records(consumed_samples)
        if writes:
            line = {"step": step, "consumed_samples": consumed_samples, "reason": reason}
            self._file.write({**line, "loss": loss, "grad_norm": grad_norm, "records": records})
            logger.warning("step %d is skipped: %s; %s names its records", step, reason, self._path)
        if too_many:
            raise TooManySkipsError(self._verdict(step, reason, records))

    def _verdict(self, step: int, reason: str, records: Sequence[str]) -> str:
        shown = ", ".join(records[:_MOST_NAMED]) + (" ..." if len(records) > _MOST_NAMED else "")
        return (
            f"{self._in_a_row} steps in a row were skipped (trainer.kto.max_consecutive_skips), the last of them step "
            f"{step}: {reason}. Its records: {shown}; {self._path} names those of all. Nothing was saved now, the "
            "newest checkpoint is from before: look at these records, or lower model.optim.lr, and go on from there"
        )


def _reason(loss: float, grad_norm: float) -> str:
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the gradient norm is {grad_norm}"
    return "a gradient on another rank is not finite"
