"""The step benchmark's workers on a tiny model: our training and NeMo-Aligner's algorithm agree on what they train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from benchmarks.kto_step.contenders import Contender, Kind
from benchmarks.kto_step.crew import Places, Worker
from benchmarks.kto_step.flops import Shape
from benchmarks.kto_step.summary import formula_flops

pytestmark = [pytest.mark.integration, pytest.mark.slow]
STEPS = 3


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    root = tmp_path_factory.mktemp("bench")
    model = tiny.make_model(root / "model", tie_word_embeddings=True)
    return Places(Path("no TRL here"), model, tiny.make_records(root / "train.jsonl", 16 * STEPS), root / "out")


def run(contender: Contender, places: Places) -> tuple[Worker, list[dict]]:
    worker = Worker(contender, places, STEPS)
    try:
        return worker, [worker.step(number, count=number == STEPS - 1) for number in range(STEPS)]
    finally:
        worker.close()


def test_both_algorithms_train_alike_and_do_the_operations_of_the_formula(places):
    """Losses within float32's rounding: rows of another padding and other products, two optimizer steps apart."""
    found = {}
    for kind in (Kind.OURS, Kind.ALIGNER):
        worker, steps = run(Contender(kind.name.lower(), "", kind, threads=1), places)
        found[kind] = steps
        counted = [{**step, "counted": number == STEPS - 1} for number, step in enumerate(steps)]
        formula = formula_flops(counted, Shape(**worker.facts["shape"]), remakes_logits=False)
        assert steps[-1]["flops"] == pytest.approx(formula, rel=1e-9)
        assert steps[-1]["swap_bytes"] == 3 * worker.facts["parameter_bytes"]
    ours, theirs = found.values()
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in theirs], abs=1e-6)
    assert [step["kl"] for step in ours] == pytest.approx([step["kl"] for step in theirs], abs=1e-4)
    assert ours[-1]["loss"] != 0.5  # the policy has left the reference
    assert len(theirs[0]["passes"]) == 2  # the reference over 2 B rows, and the training pass over them
    assert len(ours[0]["passes"]) == 4


def test_two_ranks_answer_together(places):
    _, steps = run(Contender("two", "", ranks=2, threads=1, rows=16), places)
    assert sum(run["trains"] for run in steps[0]["passes"]) == 2
    assert steps[-1]["collective_bytes"] > 0
    assert json.dumps(steps)
