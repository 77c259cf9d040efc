"""Drill: kill -9 at random moments, also while a checkpoint is being written."""

from __future__ import annotations

import random
from collections.abc import Generator
from pathlib import Path

import runs
from chains import Chain, Plan
from evidence import Trial

# of ten blows, four are aimed at a save: with two layouts, at least six must meet one
_MOMENTS = ("saving", "training", "starting", "saving", "training", "saving", "starting", "training", "saving")
_TARGETS = ("one rank", "all ranks", "everything", "the parent")


def drill(root: Path, layout: str, baseline: Path, rng: random.Random, count: int) -> Generator[Trial]:
    """Kill the run ``count`` times, then let it end. The last trial is the comparison of the whole."""
    chain = Chain(root, f"kill_{layout}", layout, baseline, rng, count)
    for plan in plans(rng, count):
        yield _blow(chain, plan)
    yield chain.finish()


def plans(rng: random.Random, count: int) -> list[Plan]:
    """Blows in a random order, with every moment and target among them where there are enough."""
    made = []
    for number in range(count):
        moment = _MOMENTS[number % len(_MOMENTS)]
        # where the parent dies alone the ranks end in an orderly way, and a save is finished
        targets = _TARGETS[:3] if moment == "saving" else _TARGETS
        saves = sum(plan.moment == "saving" for plan in made)
        asynchronous = saves % 2 == 1 if moment == "saving" else rng.random() < 0.5
        made.append(
            Plan(rng.choice(targets) if number >= 4 else targets[(number + 3) % len(targets)], moment, asynchronous)
        )
    rng.shuffle(made)
    return made


def _blow(chain: Chain, plan: Plan) -> Trial:
    trial = Trial(f"{chain.layout}: {plan}")
    job = chain.start(plan)
    victims = chain.victims(job, plan, trial)
    writing = job.drafts
    runs.kill(victims)
    if job.end(runs.GONE_S) is None:
        trial.faults.append(f"the run was still there {runs.GONE_S} s after the kill: {job.log[-600:]}")
    chain.aftermath(job, trial)
    # published after all where the blow came too late, or spared the one that writes
    trial.in_save = any(path.exists() for path in writing)
    return trial
