"""Compares KTO steps side by side: every contender does one optimizer step on the same global batch, in turn.

Contenders that take turns are all in memory at once; where they are too many for it they run in groups, each with the
baseline that its members are divided by. Operations are counted in steps of their own, after the timed ones. Writes
OUT.json (every step, and the summary), OUT.md and OUT.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.kto_step.contenders import CONTENDERS, SCALING, Contender, chosen, groups
from benchmarks.kto_step.crew import ROOT, Places, Worker
from benchmarks.kto_step.flops import Shape
from benchmarks.kto_step.over_data import Ratios, ratios, read_lengths
from benchmarks.kto_step.report import draw, table
from benchmarks.kto_step.summary import cpu_seconds, spread, summarize

_BYTES_EACH = 4.5e9  # a contender with SmolLM2 in memory, generously
_MARK_BEGIN, _MARK_END = "<!-- table of make bench -->", "<!-- end of the table -->"


def main() -> None:
    args = _arguments()
    results: dict[str, Any] = {"machine": _machine(), "contenders": {}, "steps": []}
    json_file = args.out.with_suffix(".json")
    if args.keep and json_file.is_file():
        results.update(json.loads(json_file.read_text(encoding="utf-8")))
    if not args.report_only:
        for group in groups(chosen(args.contenders), args.resident or _resident()):
            _forget(results, {c.name for c in group if c.name != c.baseline})
            _run_group(group, args, results)
            _write(results, args.out)  # after each group, so that an interrupted run leaves what it has measured
    results["over_data"] = _over_data(results, args)
    _write(results, args.out)
    if args.readme is not None:
        _put(_table(results), args.readme)
    print(args.out.with_suffix(".md").read_text(encoding="utf-8"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.kto_step", description=__doc__)
    parser.add_argument(
        "--contenders", type=lambda text: text.split(","), help="names, comma-separated (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each contender (default: 8)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument("--counted", type=int, default=4, help="steps after them whose operations are counted")
    parser.add_argument("--resident", type=int, help="contenders in memory at once (default: as many as fit)")
    parser.add_argument("--keep", action="store_true", help="add to what OUT.json holds instead of starting anew")
    parser.add_argument("--report-only", action="store_true", help="with --keep: measure nothing, write the report")
    parser.add_argument("--out", type=Path, default=ROOT / "demo_out/bench/kto_step", help="results, less the suffix")
    parser.add_argument("--readme", type=Path, help="put the table between the marks in this file")
    parser.add_argument("--assets", type=Path, default=ROOT / "demo_out/smollm2/assets", help="model and data")
    parser.add_argument("--work", type=Path, default=ROOT / "demo_out/bench", help="where the workers write")
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl/bin/python")
    return parser.parse_args()


def _run_group(group: list[Contender], args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Start a group, warm it up, let it take turns, then count operations in steps of their own."""
    period = math.lcm(*(contender.period for contender in group))
    warmup, rounds, counted = (-(-n // period) * period for n in (args.warmup, args.rounds, args.counted))
    places = Places(args.trl_python, args.assets / "model", args.assets / "train.jsonl", args.work)
    number = 1 + max((step["group"] for step in results["steps"]), default=-1)
    workers: list[Worker] = []
    try:
        for contender in group:
            _say(f"starting {contender.name}")
            workers.append(Worker(contender, places, warmup + rounds + counted))
        for batch in range(warmup + rounds + counted):
            for worker in workers:
                step = worker.step(batch, count=batch >= warmup + rounds)
                place = {"contender": worker.contender.name, "group": number, "round": batch - warmup}
                step |= {**place, "counted": batch >= warmup + rounds, "load": os.getloadavg()[0]}
                results["steps"] += [step] if batch >= warmup else []
                cost = f"{cpu_seconds(step):7.2f} CPU-s, loss {step['loss']:.5f}"
                _say(f"{worker.contender.name:22} round {batch - warmup:3} {cost}")
        for worker in workers:
            results["contenders"][worker.contender.name] = _record(worker)
    finally:
        for worker in workers:
            worker.close()


def _record(worker: Worker) -> dict[str, Any]:
    contender = asdict(worker.contender)
    return {"parameter_bytes": None, **contender, **worker.facts, "kind": worker.contender.kind.value}


def _forget(results: dict[str, Any], names: set[str]) -> None:
    """Drop what was measured earlier of contenders that run again now. Their baseline stays: others need it."""
    results["steps"] = [step for step in results["steps"] if step["contender"] not in names]


def _write(results: dict[str, Any], out: Path) -> None:
    steps, contenders = results["steps"], results["contenders"]
    present = {step["contender"] for step in steps} & contenders.keys()
    order = [contender.name for contender in (*CONTENDERS, *SCALING) if contender.name in present]
    own = {name: [step for step in steps if step["contender"] == name] for name in order}
    results["summary"] = [summarize(contenders[n], own[n], own[contenders[n]["baseline"]]) for n in order]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(_table(results), encoding="utf-8")
    if results["summary"]:
        draw(results["summary"], out.with_suffix(".png"))


def _table(results: dict[str, Any]) -> str:
    return table(results["summary"], results.get("over_data"))


def _over_data(results: dict[str, Any], args: argparse.Namespace) -> dict[str, Any] | None:
    """Spread of the formula's ratios over all batches of the data; None where nobody was measured."""
    shapes = [Shape(**contender["shape"]) for contender in results["contenders"].values()]
    if not shapes:
        return None
    lengths = read_lengths(args.assets / "train.jsonl", args.assets / "model")
    found = list(ratios(lengths, shapes[0], Contender.rows))
    return {name: asdict(spread(getattr(one, name) for one in found)) for name in Ratios._fields}


def _put(text: str, file: Path) -> None:
    """Replace what is between the two marks."""
    before, rest = file.read_text(encoding="utf-8").split(_MARK_BEGIN)
    after = rest.split(_MARK_END)[1]
    file.write_text(f"{before}{_MARK_BEGIN}\n{text}{_MARK_END}{after}", encoding="utf-8")


def _resident() -> int:
    """As many as available memory holds, and no more than take turns at a bearable pace."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return max(2, min(4, int(free * 1024 / _BYTES_EACH)))


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0], "cores": os.cpu_count(), "python": platform.python_version()}


def _say(text: str) -> None:
    print(time.strftime("%X"), text, flush=True)


if __name__ == "__main__":
    main()
