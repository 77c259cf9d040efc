"""Drill: damaged files of every kind, in copies of a run that was stopped with two checkpoints."""

from __future__ import annotations

import random
import shutil
from collections.abc import Generator
from pathlib import Path

import evidence
import runs
from chains import RESUMING
from damages import FALLS_BACK, KINDS, REFUSES, Kind
from evidence import Trial
from runs import Job

_OLDER, _NEWER, _END = 4, 8, 12
_BAD_DATA = 3  # exit code for data and checkpoints
_WORDS = ("trainer.kto.save_interval=4", f"{runs.CALLBACK}.save_top_k=1")


def drill(
    root: Path, layouts: list[str], baselines: dict[str, Path], rng: random.Random, count: int
) -> Generator[Trial]:
    """Damage a copy in each of the first ``count`` ways, on the layouts in turn."""
    kinds = KINDS if count >= len(KINDS) else rng.sample(KINDS, count)
    stopped = {layout: _stopped_run(root, layout) for layout in layouts}
    for number, kind in enumerate(kinds):
        layout = layouts[number % len(layouts)]
        out = root / f"corrupt_{number}"
        shutil.copytree(stopped[layout], out)
        kind.damage(out, rng)
        trial = Trial(f"{layout}: {kind.name}: {kind.outcome}")
        before = _files(out)
        job = Job(root, out, layout, *_WORDS, f"trainer.kto.max_steps={_END}")
        code = job.end(runs.START_S)
        trial.faults += job.left_over()
        if kind.outcome == REFUSES:
            _check_refused(job, code, before, kind, trial)
        else:
            _check_went_on(job, code, baselines[layout], kind, trial)
        yield trial


def _stopped_run(root: Path, layout: str) -> Path:
    out = root / f"stopped_{layout}"
    job = Job(root, out, layout, *_WORDS, f"trainer.kto.max_steps={_NEWER}")
    code = job.end(runs.START_S)
    if code != 0 or runs.steps_of(out) != [_OLDER, _NEWER]:
        raise RuntimeError(f"no run to damage; code {code}, checkpoints {runs.steps_of(out)}: {job.log[-1500:]}")
    return out


def _check_refused(job: Job, code: int | None, before: dict[str, int], kind: Kind, trial: Trial) -> None:
    errors = [line for line in job.log.splitlines() if line.startswith("error: ")]
    if code != _BAD_DATA:
        trial.faults.append(f"code {code}, not {_BAD_DATA}: {job.log[-1500:]}")
    if kind.says not in job.log or "Traceback" in job.log or sum(kind.says in line for line in errors) != 1:
        trial.faults.append(f"not one message that says {kind.says!r}: {job.log[-1500:]}")
    if _files(job.out) != before:
        trial.lost += 1
        trial.faults.append(f"files changed: {sorted(_files(job.out).items() ^ before.items())}")


def _check_went_on(job: Job, code: int | None, baseline: Path, kind: Kind, trial: Trial) -> None:
    falls_back = kind.outcome == FALLS_BACK
    expected = _OLDER if falls_back and kind.loses_newest else _NEWER
    found = RESUMING.search(job.log)
    if code != 0:
        trial.faults.append(f"code {code}: {job.log[-1500:]}")
    if found is None or int(found.group(1)) != expected:
        trial.faults.append(f"resumed from {found.group(0) if found else 'nothing'}, not from step {expected}")
    if ("is damaged and not used" in job.log) != falls_back:
        trial.faults.append(f"the damage is {'not ' if falls_back else ''}reported: {job.log[-1500:]}")
    if kind.says not in job.log:
        trial.faults.append(f"it does not say {kind.says!r}")
    aside = list((job.out / "checkpoints").glob("*.damaged"))
    if len(aside) != int(falls_back):
        trial.faults.append(f"set aside: {[path.name for path in aside]}")
    evidence.check_end(job.out, baseline, _END, trial)


def _files(out: Path) -> dict[str, int]:
    """Names and sizes of a run's curve, checkpoints and reference, which a run that does not start leaves alone."""
    kept = [out / "metrics.jsonl", *(out / "checkpoints").rglob("*"), *(out / "reference").rglob("*")]
    return {str(path.relative_to(out)): path.stat().st_size for path in kept if path.is_file()}
