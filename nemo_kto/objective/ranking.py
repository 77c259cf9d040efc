"""How well a score tells desirable from undesirable rows. Not used in training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Separation:
    """Means over each class, their difference, and the rank statistic. None where a class is absent."""

    num_desirable: int
    num_undesirable: int
    mean_desirable: float | None
    mean_undesirable: float | None
    margin: float | None
    """mean_desirable - mean_undesirable."""
    margin_se: float | None
    """Standard error of the margin (Welch); None where a class has fewer than two rows."""
    auc: float | None
    """Probability that a desirable row scores above an undesirable one; ties count one half."""


def separation(scores: Tensor, desirable: Tensor) -> Separation:
    """Compare the scores of the two classes.

    Args:
        scores: [n] float, in any unit; the margin has the same.
        desirable: [n] bool.
    """
    good, bad = scores[desirable].double(), scores[~desirable].double()
    mean_good = good.mean().item() if good.numel() else None
    mean_bad = bad.mean().item() if bad.numel() else None
    margin = None if mean_good is None or mean_bad is None else mean_good - mean_bad
    spread = None
    if good.numel() > 1 and bad.numel() > 1:
        spread = math.sqrt(good.var().item() / good.numel() + bad.var().item() / bad.numel())
    return Separation(good.numel(), bad.numel(), mean_good, mean_bad, margin, spread, _auc(good, bad))


def _auc(good: Tensor, bad: Tensor) -> float | None:
    """Mann-Whitney U over the number of pairs."""
    if not good.numel() or not bad.numel():
        return None
    ordered = bad.sort().values
    below = torch.searchsorted(ordered, good, side="left")
    not_above = torch.searchsorted(ordered, good, side="right")
    return ((below + not_above).double() / 2).mean().item() / bad.numel()
