"""What the ranks of test_lora.py train: recipes (what is computed), and ways of computing each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from lora_runs import LORA_ADAM, LORA_SGD, STEPS, LoraJob
from trajectory_cases import DIST, FULL, OVERLAP, SELECTIVE, SEQUENCE, Way

RECIPES = {
    "sgd": LORA_SGD,
    "adam": LORA_ADAM,
    # B is not 0, so that both halves of every adapter have a gradient at the first step, and KL_ref is not 0
    "normal": replace(LORA_SGD, alpha=4.0, row_init="normal"),
    "some": replace(LORA_ADAM, targets=("attention_qkv", "mlp_fc2"), layers=(2, 4), row_init="normal"),
    "tied": replace(LORA_SGD, objective=replace(LORA_SGD.objective, tied=True)),
    "swap": replace(LORA_ADAM, earlier=True, reference="swap"),
    "dropout": replace(LORA_SGD, dropout=0.3),
}
WITHOUT_ORACLE = ("dropout",)
"""Which units are dropped is the implementation's choice."""


@dataclass(frozen=True)
class Case(Way):
    micro: int = 4
    steps: int = STEPS

    def overrides(self, root: Path) -> list[str]:
        return [*RECIPES[self.recipe].overrides(root), *self.words]


CASES = {
    1: {
        "sgd-mb1": Case("sgd", micro=1),
        "sgd-mb2": Case("sgd", micro=2),
        "sgd": Case("sgd"),
        "sgd-full": Case("sgd", extra=FULL),
        "adam": Case("adam"),
        "normal": Case("normal", extra=(SELECTIVE,)),
        "some": Case("some"),
        "tied": Case("tied"),
        "swap": Case("swap", extra=(DIST,)),
        "dropout": Case("dropout", steps=2),
        "dropout-full": Case("dropout", extra=FULL, steps=2),
    },
    2: {
        "dp2-sgd-mb1": Case("sgd", micro=1),
        "dp2-adam-overlap": Case("adam", micro=2, extra=OVERLAP),
        "dp2-swap-overlap": Case("swap", extra=OVERLAP),
        "pp2-sgd-mb2": Case("sgd", pp=2, micro=2),
        "pp2-normal-full": Case("normal", pp=2, extra=FULL),
        "pp2-some": Case("some", pp=2, extra=(DIST,)),
        "pp2-tied": Case("tied", pp=2),
        "tp2-sgd": Case("sgd", tp=2),
        "tp2-normal-mb2": Case("normal", tp=2, micro=2),
        "tp2-adam": Case("adam", tp=2, extra=(DIST,)),
        "tp2-swap": Case("swap", tp=2),
        "tp2-dropout": Case("dropout", tp=2, steps=2),
        "tp2sp-sgd": Case("sgd", tp=2, extra=(SEQUENCE,)),
        "tp2sp-normal-full": Case("normal", tp=2, extra=(SEQUENCE, *FULL)),
        "tp2sp-some-mb1": Case("some", tp=2, micro=1, extra=(SEQUENCE,)),
        "tp2sp-dropout": Case("dropout", tp=2, extra=(SEQUENCE,), steps=2),
        "tp2sp-dropout-full": Case("dropout", tp=2, extra=(SEQUENCE, *FULL), steps=2),
    },
    4: {
        "tp2pp2-sgd": Case("sgd", tp=2, pp=2),
        "tp2pp2sp-normal-mb2": Case("normal", tp=2, pp=2, micro=2, extra=(SEQUENCE,)),
        "tp2pp2-swap": Case("swap", tp=2, pp=2, extra=(DIST,)),
        "tp2spdp2-some": Case("some", tp=2, extra=(SEQUENCE, *OVERLAP)),
        "pp2dp2-tied": Case("tied", pp=2),
    },
}


def run_case(case: Case, root: Path) -> dict:
    """Train; metrics by step, the first step's gradients, adapters before and after."""
    job = LoraJob(case.overrides(root))
    split = job.config.model.optim.is_distributed and job.groups.dp_size > 1  # each rank has a part of the gradients
    start, gradients = job.whole(), {}
    history: list[dict] = []

    def look() -> None:
        if not history and not split:
            gradients.update(job.whole(lambda parameter: parameter.main_grad))

    for batch in islice(job.batches(), case.steps):
        history.append(job.train(batch, look))
    return {"history": history, "start": start, "gradients": gradients, "adapters": job.whole()}
