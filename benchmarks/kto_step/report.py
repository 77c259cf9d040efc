"""The summary as a Markdown table and as a plot. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_HEAD = """\
| | CPU-s per step (quartiles) | ratio (range) | user s | system s | wall s | positions (padding) | GFLOP | peak GB |
|---|--:|--:|--:|--:|--:|--:|--:|--:|
"""
_EXPLAINED = 0.01  # largest relative difference of counted operations to the formula's that goes without saying
_AXIS = "CPU-seconds per optimizer step (dark: user, light: system), median, quartiles; ratio to TRL"
_BUSY = 0.5  # load average above a contender's own threads
_COLORS = {"TRL": "#7f7f7f", "nemo_kto": "#2a7f3f", "NeMo-Aligner's algorithm": "#b5651d"}


def table(rows: Sequence[Row], over_data: dict[str, Row] | None = None) -> str:
    """One table per precision, and a line per one-time cost, per scaling and for the operations over all data."""
    parts = []
    for bf16, heading in ((False, "float32"), (True, "bfloat16")):
        found = [row for row in rows if row["bf16"] == bf16]
        if found:
            parts.append(f"{heading}\n\n{_HEAD}" + "".join(_line(row, found) for row in found))
    notes = [note for row in rows for note in _notes(row)]
    if over_data:
        notes.append(_over_data(over_data))
    return "\n".join(parts) + ("\n" + "".join(f"- {note}\n" for note in notes) if notes else "")


def _line(row: Row, rows: Sequence[Row]) -> str:
    cpu, ratio = row["cpu_s"], row["cpu_ratio"]
    is_baseline = row["name"] == row["baseline"]
    cells = [
        row["title"],
        f"{cpu['median']:.2f} ({cpu['lower']:.2f} to {cpu['upper']:.2f})",
        "1" if is_baseline else f"{ratio['median']:.2f} ({ratio['smallest']:.2f} to {ratio['largest']:.2f})",
        *(f"{row[name]['median']:.2f}" for name in ("user_s", "sys_s", "wall_s")),
        f"{row['tokens_per_step']:.0f} ({100 * row['pad_share']:.1f} %)",
        "" if row["flops"] is None else _flops(row, rows),
        f"{row['peak_bytes'] / 1e9:.2f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def _flops(row: Row, rows: Sequence[Row]) -> str:
    """Counted operations, and their ratio to those of NeMo-Aligner's algorithm where it took part."""
    theirs = [other["flops"] for other in rows if other["kind"].startswith("NeMo-Aligner") and other["flops"]]
    return f"{row['flops'] / 1e9:.0f}" + (f" ({row['flops'] / theirs[0]:.2f})" if theirs else "")


def _notes(row: Row) -> list[str]:
    notes, once = [], row["once"]
    if row["load"] > row["threads"] + _BUSY:
        notes.append(f"{row['title']}: load average {row['load']:.1f}: others were using the machine, measure again")
    if once:
        seconds = once["user_s"] + once["sys_s"]
        notes.append(f"{row['title']}, once: {seconds:.1f} CPU-s for {once['rows']} samples")
    if row.get("efficiency"):
        spread = row["efficiency"]
        values = f"{spread['median']:.2f} ({spread['smallest']:.2f} to {spread['largest']:.2f})"
        notes.append(f"{row['title']}: efficiency {values} against {row['baseline']}")
    if row["flops"] and abs(row["flops"] / row["flops_formula"] - 1) > _EXPLAINED:
        factor = row["flops"] / row["flops_formula"]
        notes.append(f"{row['title']}: counted operations are {factor:.2f} times the formula's")
    if row["swap_parameters"] is not None:
        notes.append(f"{row['title']}: {row['swap_parameters']:.3f} x parameter bytes moved per step by the reference")
    return notes


def _over_data(found: dict[str, Row]) -> str:
    """Medians with quartiles, one saving after the other."""
    names = {
        "forward_pairs": "mismatched pairs without backward",
        "responses": "logits of responses alone",
        "swap": "packing (nemo_kto)",
        "cached": "reference cached",
    }
    parts = [
        f"{title} {found[name]['median']:.2f} ({found[name]['lower']:.2f} to {found[name]['upper']:.2f})"
        for name, title in names.items()
    ]
    return (
        f"operations over NeMo-Aligner's algorithm by the formula, for all {found['swap']['count']:,} batches of the "
        f"data, median (quartiles), each with those before it: {', '.join(parts)}"
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of CPU-seconds per step, user and system apart, with the ratio to each bar's baseline; PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = [found for bf16 in (False, True) if (found := [row for row in rows if row["bf16"] == bf16])]
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, grid = plt.subplots(
            len(panels),
            1,
            figsize=(9, 0.7 + 0.45 * len(rows) + 0.5 * len(panels)),
            height_ratios=[len(panel) for panel in panels],
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        for axes, panel in zip(grid[:, 0], panels, strict=True):
            _draw_panel(axes, panel)
        grid[-1, 0].set_xlabel(_AXIS)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _draw_panel(axes: Any, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        color, cpu = _COLORS[row["kind"]], row["cpu_s"]
        user = row["user_s"]["median"]
        axes.barh(place, user, color=color)
        axes.barh(place, max(cpu["median"] - user, 0), left=user, color=color, alpha=0.45)
        axes.plot([cpu["lower"], cpu["upper"]], [place, place], color="black", linewidth=1)
        axes.text(cpu["upper"], place, f"  {row['cpu_ratio']['median']:.2f}", va="center")
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.invert_yaxis()
    axes.set_title("bfloat16" if rows[0]["bf16"] else "float32", loc="left")
    axes.grid(visible=True, axis="x", color="0.9")
    axes.set_axisbelow(True)
