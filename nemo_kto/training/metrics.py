"""From sums over the global batch to named means, and their home on disk. Computes no loss."""

from __future__ import annotations

import json
import logging
import math
import resource
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch

from nemo_kto.objective.counts import BatchCounts

logger = logging.getLogger(__name__)

Metrics: TypeAlias = dict[str, float | int | None]
"""Metric values by name; None where a mean has no row to be taken over."""

SUMS = (
    "loss",
    "rewards_desirable",
    "rewards_undesirable",
    "logps_desirable",
    "logps_undesirable",
    "correct",
    "kl_ref",
)
"""What one pass over a global batch adds up: the loss addends; rewards and policy log-probs by class; rows on the
right side of the reference point; the reference point times the number of rows."""


def named_means(sums: Mapping[str, float], counts: BatchCounts, beta: float) -> Metrics:
    """Means in TRL's vocabulary, each over its own denominator.

    Args:
        sums: totals by the names of :data:`SUMS`, over the batches that ``counts`` counts.
        counts: rows behind the sums.
        beta: ``ref_policy_kl_penalty``; ``kl`` is the reference point over beta, in nats.
    """
    chosen = _mean(sums["rewards_desirable"], counts.num_desirable)
    rejected = _mean(sums["rewards_undesirable"], counts.num_undesirable)
    kl_ref = _mean(sums["kl_ref"], counts.num_samples)
    return {
        "loss": sums["loss"],
        "kl": None if kl_ref is None else kl_ref / beta,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": None if chosen is None or rejected is None else chosen - rejected,
        "rewards/accuracies": _mean(sums["correct"], counts.num_samples),
        "logps/chosen": _mean(sums["logps_desirable"], counts.num_desirable),
        "logps/rejected": _mean(sums["logps_undesirable"], counts.num_undesirable),
        "num_desirable": counts.num_desirable,
        "num_undesirable": counts.num_undesirable,
        "kl_pairs": counts.num_kl_pairs,
    }


def peak_memory_bytes() -> int:
    """Most device memory this process has allocated; without CUDA, its largest resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, appended and flushed, undefined values as null.

    Args:
        path: the file; a resumed run goes on in it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: list[str] = []

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one object. Lines that a full disk refuses are said once, kept, and written when there is room."""
        self._unwritten.append(json.dumps({key: _json_value(value) for key, value in metrics.items()}) + "\n")
        rest = "".join(self._unwritten).encode()
        try:
            # no buffer: it would try again whenever it is touched, to cut off half a line too
            with self._path.open("ab", buffering=0) as file:
                start = file.tell()
                try:
                    while rest:
                        rest = rest[file.write(rest) :]  # a full disk takes a part first
                except OSError:
                    with suppress(OSError):
                        file.truncate(start)  # no half line, which the next attempt would continue
                    raise
        except OSError as error:
            if len(self._unwritten) == 1:
                logger.error("%s cannot be written (%s): its lines wait for room. Training goes on", self._path, error)
            return
        self._unwritten.clear()

    def go_back_to(self, step: int) -> None:
        """Drop the lines of steps after ``step``, which a run that resumes there writes again, and half a last line.

        Where a run begins anew in a used directory, the lines of the run before are set aside whole.
        """
        if not self._path.is_file():
            return
        if step == 0:
            self._path.replace(_unused(self._path))
            return
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _is_up_to(step, line)]
        if len(kept) < len(lines):
            draft = self._path.with_name(f".{self._path.name}.draft")
            draft.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            draft.replace(self._path)


def _is_up_to(step: int, line: str) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


def _unused(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.stem}.before-{number}{path.suffix}")).exists():
        number += 1
    return aside


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
