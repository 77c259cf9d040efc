"""Draws the training curves of one or more runs. Not a verb: `report` uses it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_kto.cli.metrics_file import Run

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette: colour-blind readers can tell these apart."""
DOTS = {"marker": "o", "linestyle": ":", "markeredgecolor": "black", "markersize": 6}
SMOOTHED_FROM = 40
"""A series of at least this many steps gets a running mean; its single steps are drawn faint."""


@dataclass(frozen=True)
class Panel:
    """One axes: a title, a unit for the y axis, and its series as key -> line label."""

    title: str
    unit: str
    series: dict[str, str]
    level: float | None = None
    """Where a thin reference line goes: what an untrained policy would show."""
    is_schedule: bool = False
    """Known beforehand and free of noise: never smoothed."""


REWARD = "beta x log-ratio, nats"
PANELS = (
    Panel("loss", "loss", {"loss": ""}),
    Panel("KL reference point / beta", "nats", {"kl": ""}),
    Panel("rewards", REWARD, {"rewards/chosen": "desirable", "rewards/rejected": "undesirable"}, 0.0),
    Panel("reward margin, desirable - undesirable", REWARD, {"rewards/margins": ""}, 0.0),
    Panel("reward accuracy", "fraction of samples", {"rewards/accuracies": ""}, 0.5),
    Panel("gradient norm, before clipping", "L2 norm", {"grad_norm": ""}),
    Panel("learning rate", "per step", {"lr": ""}, is_schedule=True),
    Panel("speed", "tokens per second", {"tokens_per_second": ""}),
)


def draw(runs: list[Run], out: Path) -> None:
    """Write the curves of ``runs`` to ``out`` as PNG. Several runs differ by colour."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, grid = plt.subplots(2, 4, figsize=(17, 7.6), layout="constrained")
        for axes, panel in zip(grid.flat, PANELS, strict=True):
            _draw_panel(axes, panel, runs)
        for axes in grid[-1]:
            axes.set_xlabel("optimizer step")
        handles = _legend_handles(runs)
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        figure.suptitle(" vs ".join(run.name for run in runs), fontsize=13)
        figure.savefig(out, dpi=110)
        plt.close(figure)


def _draw_panel(axes: Any, panel: Panel, runs: list[Run]) -> None:
    for index, run in enumerate(runs):
        for position, (key, label) in enumerate(panel.series.items()):
            alone = len(runs) == 1
            line = {
                "color": COLORS[(position if alone else index) % len(COLORS)],
                "linestyle": "-" if alone or position == 0 else "--",
            }
            steps, values = run.series(key)
            if len(values) >= SMOOTHED_FROM and not panel.is_schedule:
                axes.plot(steps, values, **line, linewidth=0.8, alpha=0.35, zorder=2)
                values = running_mean(values, smoothing_window(len(values)))
            axes.plot(steps, values, **line, label=label if index == 0 else None, zorder=3)
            axes.plot(*run.series(key, validation=True), color=line["color"], **DOTS, zorder=4)
    if not any(len(line.get_xdata()) for line in axes.lines):
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color="0.5")
    if panel.level is not None:
        axes.axhline(panel.level, color="0.5", linewidth=0.8, zorder=1)
    if len(panel.series) > 1:
        axes.legend(framealpha=0.8, edgecolor="none", loc="best")
    axes.set_title(panel.title, loc="left")
    axes.set_ylabel(panel.unit)
    axes.grid(visible=True, color="0.9")
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", integer=True)
    if panel.is_schedule:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def smoothing_window(count: int) -> int:
    """Width of the running mean for a series of ``count`` steps; 1: none."""
    return max(1, count // 12) if count >= SMOOTHED_FROM else 1


def running_mean(values: list[float], window: int) -> list[float]:
    """Centred mean over ``window`` steps, over fewer at both ends."""
    box = np.ones(window)
    sums = np.convolve(values, box, mode="same")
    counts = np.convolve(np.ones(len(values)), box, mode="same")
    return list(sums / counts)


def _legend_handles(runs: list[Run]) -> list[Any]:
    from matplotlib.lines import Line2D

    color = "0.3" if len(runs) == 1 else "0.5"
    handles = []
    if len(runs) > 1:
        handles += [Line2D([], [], color=COLORS[i % len(COLORS)], label=run.name) for i, run in enumerate(runs)]
    longest = max(len(run.train) for run in runs)
    window = smoothing_window(longest)
    if window > 1:
        handles.append(Line2D([], [], color=color, linewidth=0.8, alpha=0.5, label="training, each step"))
        handles.append(Line2D([], [], color=color, label=f"training, mean of {window} steps"))
    else:
        handles.append(Line2D([], [], color=color, label="training"))
    if any(run.validation for run in runs):
        handles.append(Line2D([], [], color=color, **DOTS, label="validation"))
    return handles
