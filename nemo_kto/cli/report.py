"""Draw a run's metrics.jsonl as curves: a PNG, and one HTML page that needs nothing else."""

from __future__ import annotations

import argparse
import base64
import html
import importlib.util
import statistics
from pathlib import Path

from nemo_kto.cli.metrics_file import Run, read_run
from nemo_kto.errors import ConfigError

EXAMPLE = """\
example:
  nemo-kto report --metrics kto_results/metrics.jsonl
  nemo-kto report --metrics a/metrics.jsonl --compare b/metrics.jsonl --out comparison"""

MEASURES = {
    "loss": ("loss", "{:.4f}"),
    "kl": ("KL reference point, nats", "{:.4f}"),
    "rewards/margins": ("reward margin", "{:+.4f}"),
    "rewards/chosen": ("reward of desirable", "{:+.4f}"),
    "rewards/rejected": ("reward of undesirable", "{:+.4f}"),
    "rewards/accuracies": ("reward accuracy", "{:.3f}"),
    "grad_norm": ("gradient norm", "{:.3f}"),
}
LAST_STEPS = 10

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }}
img {{ width: 100%; height: auto }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3rem .9rem; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
</style></head><body>
<h1>{title}</h1>
<img alt="training curves" src="data:image/png;base64,{image}">
{tables}
</body></html>
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("--metrics", type=Path, required=True, metavar="FILE", help="metrics.jsonl of a run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: beside the metrics file)")
    parser.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="FILE", help="metrics.jsonl of other runs, drawn along"
    )


def run(args: argparse.Namespace) -> int:
    """Write ``curves.png`` and ``report.html`` and print where they are."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("report draws with matplotlib, which is not installed: pip install 'nemo_kto[report]'")
    from nemo_kto.cli.curves import draw

    paths = [args.metrics, *args.compare]
    runs = [read_run(path) for path in paths]
    if len({r.name for r in runs}) < len(runs):
        for r, path in zip(runs, paths, strict=True):
            r.name = str(path)
    out: Path = args.out or args.metrics.parent
    out.mkdir(parents=True, exist_ok=True)
    draw(runs, out / "curves.png")
    page = render(runs, (out / "curves.png").read_bytes())
    (out / "report.html").write_text(page, encoding="utf-8")
    print(f"curves: {out / 'curves.png'}\nreport: {out / 'report.html'}")
    return 0


def render(runs: list[Run], image: bytes) -> str:
    """The HTML page: curves, and for each run what it did and where its measures began and ended."""
    title = html.escape("KTO training: " + " vs ".join(r.name for r in runs))
    tables = "\n".join(_tables(r) for r in runs)
    return PAGE.format(title=title, image=base64.b64encode(image).decode("ascii"), tables=tables)


def _tables(r: Run) -> str:
    facts = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in _facts(r).items())
    head = f"<th>measure</th><th>first step</th><th>mean of last {LAST_STEPS} steps</th><th>last validation</th>"
    rows = "".join(f"<tr><td>{label}</td>{_cells(r, key, form)}</tr>" for key, (label, form) in MEASURES.items())
    return f"<h2>{html.escape(r.name)}</h2>\n<table>{facts}</table>\n<table><tr>{head}</tr>{rows}</table>"


def _cells(r: Run, key: str, form: str) -> str:
    values, validation = r.series(key)[1], r.series(key, validation=True)[1]
    cells = (values[:1], [statistics.fmean(values[-LAST_STEPS:])] if values else [], validation[-1:])
    return "".join(f"<td>{form.format(cell[0]) if cell else '-'}</td>" for cell in cells)


def _facts(r: Run) -> dict[str, str]:
    """What a run did, as far as its file tells."""
    facts = {}
    steps = sorted(r.train)
    if steps:
        facts["optimizer steps"] = f"{steps[0]} to {steps[-1]}"
    samples = r.series("consumed_samples")[1]
    if samples:
        facts["samples seen"] = f"{samples[-1]:,.0f}"
    tokens, seconds = r.series("tokens")[1], r.series("step_time_s")[1]
    if tokens:
        facts["tokens trained on"] = f"{sum(tokens):,.0f}"
    if seconds:
        # no medians: with model.kto.reference_lookahead they would leave out the steps that score for the others
        facts["time in steps"] = f"{sum(seconds):,.1f} s ({sum(seconds) / len(seconds):.3g} s each)"
    if tokens and sum(seconds) > 0:
        facts["tokens per second"] = f"{sum(tokens) / sum(seconds):,.0f}"
    memory = r.series("peak_memory_bytes")[1]
    if memory:
        facts["peak memory"] = f"{max(memory) / 2**30:.2f} GiB"
    return facts
