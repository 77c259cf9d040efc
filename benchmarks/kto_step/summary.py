"""From what every step has cost to one row per contender: medians, quartiles, ratios. Pure numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.kto_step.flops import Pass, Shape, step_flops

Step = Mapping[str, Any]
"""One answer for one step: ``contender``, ``group``, ``round``, ``counted``, ``load``, and what was measured."""


@dataclass(frozen=True)
class Spread:
    """Median, quartiles, extremes and number of some values."""

    median: float
    lower: float
    upper: float
    smallest: float
    largest: float
    count: int


def spread(values: Iterable[float]) -> Spread:
    """Quartiles interpolate linearly between the values themselves."""
    found = sorted(values)
    if len(found) == 1:
        return Spread(*found * 5, 1)
    lower, median, upper = statistics.quantiles(found, n=4, method="inclusive")
    return Spread(median, lower, upper, found[0], found[-1], len(found))


def cpu_seconds(step: Step) -> float:
    """User and system time of all of a contender's processes."""
    return step["user_s"] + step["sys_s"]


def per_period(steps: Sequence[Step], period: int, cost: Callable[[Step], float]) -> dict[tuple[int, int], float]:
    """Mean cost of a step over each whole period, by (group, first round). What fills no period is left out."""
    found: dict[tuple[int, int], float] = {}
    for group in dict.fromkeys(step["group"] for step in steps):
        costs = [(s["round"], cost(s)) for s in steps if s["group"] == group and not s["counted"]]
        for start in range(0, len(costs) - period + 1, period):
            window = costs[start : start + period]
            found[group, window[0][0]] = sum(value for _, value in window) / period
    return found


def ratios(steps: Sequence[Step], baseline: Sequence[Step], period: int, cost: Callable[[Step], float]) -> list[float]:
    """Cost of a contender over that of its baseline, for each period that both have run in the same rounds."""
    own, other = per_period(steps, period, cost), per_period(baseline, period, cost)
    return [value / other[place] for place, value in own.items() if place in other]


def counted_flops(steps: Sequence[Step]) -> float | None:
    """Counted operations per step, as a mean over the counted steps; None if none was."""
    counts = [step["flops"] for step in steps if step["counted"]]
    return statistics.fmean(counts) if counts else None


def formula_flops(steps: Sequence[Step], shape: Shape, *, remakes_logits: bool) -> float | None:
    """The closed formula's operations per step for the same steps."""
    passes = [[Pass(**run) for run in step["passes"]] for step in steps if step["counted"]]
    found = [step_flops(shape, runs, remakes_logits=remakes_logits) for runs in passes]
    return statistics.fmean(found) if found else None


def summarize(contender: Mapping[str, Any], steps: Sequence[Step], baseline: Sequence[Step]) -> dict[str, Any]:
    """One contender's row.

    Args:
        contender: its attributes, and ``shape`` and ``parameter_bytes`` (or None) as its worker told.
        steps: its steps, warm-up left out, in the order they ran.
        baseline: its baseline's.
    """
    period = contender["period"]
    timed = [step for step in steps if not step["counted"]]
    tokens = sum(map(_tokens, timed))
    pads = sum(run["pad_tokens"] for step in timed for run in step["passes"])
    shape = Shape(**contender["shape"])
    moved = [step["swap_bytes"] for step in timed if step.get("swap_bytes") is not None]
    return {
        **{name: contender[name] for name in ("name", "title", "kind", "baseline", "bf16")},
        **{
            name: asdict(spread(per_period(steps, period, cost).values()))
            for name, cost in {
                "cpu_s": cpu_seconds,
                "user_s": lambda step: step["user_s"],
                "sys_s": lambda step: step["sys_s"],
                "wall_s": lambda step: step["wall_s"],
            }.items()
        },
        "cpu_ratio": asdict(spread(ratios(steps, baseline, period, cpu_seconds))),
        "user_ratio": asdict(spread(ratios(steps, baseline, period, lambda step: step["user_s"]))),
        "wall_ratio": asdict(spread(ratios(steps, baseline, period, lambda step: step["wall_s"]))),
        "tokens_per_step": tokens / len(timed),
        "pad_share": pads / tokens,
        "peak_bytes": max(step["peak_bytes"] for step in timed),
        "flops": counted_flops(steps),
        "flops_formula": formula_flops(steps, shape, remakes_logits=contender["remakes_logits"]),
        "collective_bytes": _mean_of(steps, "collective_bytes"),
        "swap_bytes": statistics.fmean(moved) if moved else None,
        "swap_parameters": statistics.fmean(moved) / contender["parameter_bytes"] if moved else None,
        "largest_loss_difference": _largest_difference(steps, baseline, "loss"),
        "largest_kl_difference": _largest_difference(steps, baseline, "kl"),
        "once": contender["once"],
        "threads": contender["ranks"] * contender["threads"],
        "load": statistics.median(step["load"] for step in timed),
        "efficiency": _efficiency(contender, steps, baseline),
    }


def _tokens(step: Step) -> int:
    return sum(run["tokens"] for run in step["passes"])


def _efficiency(
    contender: Mapping[str, Any], steps: Sequence[Step], baseline: Sequence[Step]
) -> dict[str, Any] | None:
    """Positions per second and rank, over those of the baseline; None for a single rank."""
    if contender["ranks"] == 1:
        return None
    slower = ratios(steps, baseline, 1, lambda step: step["wall_s"] / _tokens(step))
    return asdict(spread(1 / (contender["ranks"] * ratio) for ratio in slower))


def _mean_of(steps: Sequence[Step], name: str) -> float | None:
    values = [step[name] for step in steps if step.get(name) is not None]
    return statistics.fmean(values) if values else None


def _largest_difference(steps: Sequence[Step], baseline: Sequence[Step], name: str) -> float | None:
    """Of a metric, between the two in the same group and round."""
    other = {(step["group"], step["round"]): step[name] for step in baseline}
    differences = [abs(s[name] - other[s["group"], s["round"]]) for s in steps if (s["group"], s["round"]) in other]
    return max(differences, default=None)
