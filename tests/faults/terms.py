"""Drill: SIGTERM and SIGUSR1 at random moments. The run must end by itself, with its very last step saved."""

from __future__ import annotations

import random
import signal
from collections.abc import Generator
from pathlib import Path

import evidence
import runs
from chains import Chain, Plan
from evidence import Trial

_STOPPED = 4  # exit code of a run that can be resumed
_MOMENTS = ("training", "starting", "saving", "training", "starting", "saving", "training", "training", "saving")
_TARGETS = ("one rank", "the parent", "all ranks", "everything")


def drill(root: Path, layout: str, baseline: Path, rng: random.Random, count: int) -> Generator[Trial]:
    """Stop the run ``count`` times, then let it end. The last trial is the comparison of the whole."""
    chain = Chain(root, f"term_{layout}", layout, baseline, rng, count)
    offset = rng.randrange(len(_TARGETS))
    plans = [
        Plan(_TARGETS[(number + offset) % len(_TARGETS)], _MOMENTS[number % len(_MOMENTS)], rng.random() < 0.5)
        for number in range(count)
    ]
    rng.shuffle(plans)
    for number, plan in enumerate(plans):
        kind = signal.SIGUSR1 if number % 3 == 2 else signal.SIGTERM
        yield _stop(chain, plan, kind, again=number % 3 == 1)
    yield chain.finish()


def _stop(chain: Chain, plan: Plan, kind: signal.Signals, *, again: bool) -> Trial:
    trial = Trial(f"{chain.layout}: {kind.name}{' twice' if again else ''} to {plan}")
    job = chain.start(plan)
    victims = chain.victims(job, plan, trial)
    trial.in_save = bool(job.drafts)
    runs.kill(victims, kind)
    if again:
        job.until(lambda: False, chain.rng.uniform(0, 1.5))
        runs.kill([pid for pid in victims if pid in job.processes], chain.rng.choice([signal.SIGTERM, signal.SIGUSR1]))
    code = job.end(runs.STOP_S)
    done, saved = evidence.last_step(chain.out), evidence.newest(chain.out)
    if code != _STOPPED and not (code == 0 and done == runs.STEPS):
        trial.faults.append(f"ended with code {code} after step {done}: {job.log[-1500:]}")
    if job.has_begun and done != saved:
        trial.lost += max(0, done - saved)
        trial.faults.append(f"stopped after step {done}, but the newest checkpoint is of step {saved}")
    chain.aftermath(job, trial)
    return trial
