"""Fault drills: kills, signals, a full disk and damaged files against real runs, and a table of what was lost.

Takes about half an hour on two idle cores. Exit code 0 where everything survived and nothing was lost.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import corrupt
import evidence
import full_disk
import kills
import runs
import terms
from damages import KINDS
from evidence import Trial
from runs import Job

DRILLS = ("kill", "term", "disk", "corrupt")
_BASELINE_SAVES = 12  # its checkpoints: at the end, and at the step where the runs with damaged files end


class Table:
    """Rows of what was tried; says every trial as it comes."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.faults: list[str] = []
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Tell how far the drill is."""
        print(f"[{(time.monotonic() - self._began) / 60:5.1f} min] {text}", file=sys.stderr, flush=True)

    def add(self, name: str, trials: Generator[Trial], tried: int) -> list[Trial]:
        """Make a row of trials; those beyond ``tried`` are of the whole row, and hurt it without being counted."""
        seen: list[Trial] = []
        with closing(trials):  # a disk is unmounted before anything is deleted, whatever interrupts
            for trial in trials:
                seen.append(trial)
                self.say(f"{trial.name}{' [in a save]' if trial.in_save else ''}: {'' if trial.faults else 'ok'}")
                self._blame(trial)
        survived = sum(not trial.faults for trial in seen[:tried])
        lost = sum(trial.lost for trial in seen)
        in_save = sum(trial.in_save for trial in seen)
        note = f" ({in_save} during a save)" if in_save else ""
        self.rows.append(f"| {name}{note} | {tried} | {survived} | {lost} |")
        return seen

    def _blame(self, trial: Trial) -> None:
        for fault in trial.faults:
            self.faults.append(f"{trial.name}: {fault}")
            self.say(f"FAULT {fault}")

    def markdown(self) -> str:
        """The table."""
        return "\n".join(["| drill | tried | survived | lost |", "| --- | --: | --: | --: |", *self.rows])


def main() -> int:
    """Run the drills that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(DRILLS), help="some of the drills, with commas between")
    parser.add_argument(
        "--count", type=int, default=20, help="blows of each drill at most (default: 20, over layouts)"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments (default: the time)")
    args = parser.parse_args()
    only = args.only.split(",")
    if set(only) - set(DRILLS):
        parser.error(f"--only takes {', '.join(DRILLS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    root, table = Path(tempfile.mkdtemp(prefix="drill-")), Table()
    print(f"--seed {args.seed}, in {root}", file=sys.stderr)
    try:
        _run(root, only, args.count, random.Random(args.seed), table)
    finally:
        runs.end_all()
        if not table.faults:
            shutil.rmtree(root, ignore_errors=True)
    print(table.markdown())
    for fault in table.faults:
        print(f"FAULT {fault}")
    return 1 if table.faults else 0


def _run(root: Path, only: list[str], count: int, rng: random.Random, table: Table) -> None:
    layouts = list(runs.LAYOUTS)
    runs.make_material(root)
    baselines = {layout: _baseline(root, layout) for layout in layouts}
    table.say("the uninterrupted runs are there")
    each = max(1, count // len(layouts))
    if "kill" in only:
        hits = 0
        for layout in layouts:
            trials = table.add(
                f"kill -9 at random moments, {layout}", kills.drill(root, layout, baselines[layout], rng, each), each
            )
            hits += sum(trial.in_save for trial in trials)
        if hits < 3 * each * len(layouts) // 10:
            table.faults.append(f"only {hits} kills met a save that was in progress: try another --seed")
    if "term" in only:
        for layout in layouts:
            blows = terms.drill(root, layout, baselines[layout], rng, each)
            table.add(f"SIGTERM or SIGUSR1 at random moments, {layout}", blows, each)
    if "disk" in only:
        _disk(root, layouts, baselines, count, table)
    if "corrupt" in only:
        kinds = min(count, len(KINDS))
        table.add("damaged files", corrupt.drill(root, layouts, baselines, rng, kinds), kinds)


def _disk(root: Path, layouts: list[str], baselines: dict[str, Path], count: int, table: Table) -> None:
    variants = min(count, len(full_disk.VARIANTS))
    if full_disk.can_mount(root):
        table.add("disk full during a save", full_disk.drill(root, layouts, baselines, variants), variants)
    else:
        table.rows.append("| disk full during a save: not tried, mounting a small disk needs root | 0 | 0 | 0 |")


def _baseline(root: Path, layout: str) -> Path:
    """The run that nothing happens to. It keeps all its checkpoints, and is not disturbed by many."""
    out = root / f"whole_{layout}"
    words = (f"trainer.kto.save_interval={_BASELINE_SAVES}", f"{runs.CALLBACK}.save_top_k=0")
    job = Job(root, out, layout, *words, f"{runs.CALLBACK}.save_last_k=100")
    code = job.end(2 * runs.START_S)
    if code != 0 or evidence.newest(out) != runs.STEPS:
        raise RuntimeError(f"the uninterrupted run ended with code {code}: {job.log[-1500:]}")
    return out


if __name__ == "__main__":
    sys.exit(main())
