"""A chain: one run directory whose run is stopped again and again, and must come out like one that never was."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

import evidence
import runs
from evidence import Trial
from runs import Job

RESUMING = re.compile(r"resuming from \S+, step (\d+)")
_ROOM = 4  # steps that a save in progress may need beyond the step that is waited for


@dataclass(frozen=True)
class Plan:
    """One blow: at whom, when, and how checkpoints are saved meanwhile.

    Attributes:
        target: ``one rank``, ``all ranks``, ``the parent`` or ``everything``.
        moment: ``starting`` (any time before the first step), ``training`` or ``saving``.
        asynchronous: whether checkpoints are written beside the training.
    """

    target: str
    moment: str
    asynchronous: bool

    def __str__(self) -> str:
        how = f", {'async' if self.asynchronous else 'sync'} save" if self.moment == "saving" else ""
        return f"{self.target}, {self.moment}{how}"


class Chain:
    """Starts the run, finds the moment for a blow, and checks what is left.

    Args:
        root: where model, data and the run directories are.
        name: of the run directory.
        layout: key of ``runs.LAYOUTS``.
        baseline: directory of the uninterrupted run.
        rng: of the moments.
        blows: number of blows that the run's steps must last for.
    """

    def __init__(self, root: Path, name: str, layout: str, baseline: Path, rng: random.Random, blows: int) -> None:
        self.root, self.layout, self.baseline, self.rng = root, layout, baseline, rng
        self.out = root / name
        self._blows_left = blows
        self._unproven: list[Trial] = []

    def start(self, plan: Plan) -> Job:
        """Start the run, or go on with it."""
        self._resumable = evidence.newest(self.out)
        switch = f"{runs.CALLBACK}.async_save={str(plan.asynchronous).lower()}"
        return Job(self.root, self.out, self.layout, switch)

    def victims(self, job: Job, plan: Plan, trial: Trial) -> list[int]:
        """Wait for the moment of the plan, and return the processes that the blow meets.

        If the run ends, or hangs, before that moment, that is a fault, and there are none.
        """
        if not self._reaches(job, plan):
            trial.faults.append(f"the moment did not come; code {job.process.poll()}: {job.log[-1500:]}")
            runs.kill(job.processes)
            return []
        if plan.target == "one rank":
            return [self.rng.choice(job.ranks)]
        if plan.target == "all ranks":
            return job.ranks
        return [job.process.pid] if plan.target == "the parent" else job.processes

    def _reaches(self, job: Job, plan: Plan) -> bool:
        """Wait; a process is left alone until it handles signals, in the first tenths of a second."""
        if plan.target in ("one rank", "all ranks") or plan.moment != "starting":
            is_there = job.until(lambda: len(job.ranks) == 2 and all(runs.listens(pid) for pid in job.ranks))
        else:
            is_there = job.until(lambda: runs.listens(job.process.pid))
        if not is_there:
            return False
        if plan.moment == "starting":
            return not job.until(lambda: False, self.rng.uniform(0, 12)) and job.process.poll() is None
        goal = self._resumable + self._steps_ahead()
        if not job.until(lambda: job.has_begun and evidence.last_step(self.out) >= goal, poll=0.02):
            return False
        if plan.moment == "saving" and not job.until(lambda: bool(job.drafts), poll=0.004):
            return False
        pause = 0.1 if plan.moment == "saving" else 1.0
        job.until(lambda: False, self.rng.uniform(0, pause), poll=0.01)
        return job.process.poll() is None

    def _steps_ahead(self) -> int:
        """Some steps, so few that all later blows still find a run that is not done."""
        each = (runs.STEPS - self._resumable) // max(1, self._blows_left) - _ROOM
        self._blows_left -= 1
        return self.rng.randint(1, max(1, min(each, 5)))

    def aftermath(self, job: Job, trial: Trial) -> None:
        """Check what must hold after any blow, and whether this start went on from where the run was."""
        trial.faults += [f"{name} was left over, {runs.GONE_S} s after the end" for name in job.left_over()]
        self.prove(job)
        newest = evidence.newest(self.out)
        if newest < self._resumable:
            trial.lost += self._resumable - newest
            trial.faults.append(f"the newest checkpoint is step {newest}; step {self._resumable} was there before")
        if job.has_begun:
            evidence.compare_metrics(self.out, self.baseline, newest, trial)
        evidence.check_visible(self.out, trial)
        self._unproven.append(trial)

    def prove(self, job: Job) -> None:
        """Blame the blows before this start if it did not go on from the newest checkpoint they left."""
        if not job.has_begun:
            return
        found = RESUMING.search(job.log)
        step = int(found.group(1)) if found else 0
        for trial in self._unproven:
            if step != self._resumable:
                trial.lost += max(0, self._resumable - step)
                trial.faults.append(f"the next start went on from step {step}, not {self._resumable}")
        self._unproven = []

    def finish(self) -> Trial:
        """Let the run come to its end, and compare it with the uninterrupted one."""
        trial = Trial(f"{self.layout}: the end of the run")
        job = self.start(Plan("nobody", "", asynchronous=False))
        code = job.end(2 * runs.START_S)
        if code != 0:
            trial.faults.append(f"the last start ended with code {code}: {job.log[-600:]}")
        trial.faults += job.left_over()
        self.prove(job)
        evidence.check_end(self.out, self.baseline, runs.STEPS, trial)
        evidence.check_clean(self.out, trial)
        return trial
