"""``nemo-kto train`` in every layout writes one metrics.jsonl, that of the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import command_line
import oracle
import pytest
import torch
from trajectory import (
    ADAM,
    GLOBAL_BATCH,
    PAPER,
    SEQ_LENGTH,
    SGD,
    STEPS,
    Recipe,
    make_files,
    one_thread,
    records,
    write_records,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow]

RECIPES = {"kto": ADAM, "kto_sgd": SGD, "kto_paper": PAPER}
TP2, PP2 = "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"
VALIDATES = "validates"
RUNS = {
    "tp1-mb1": ("kto", 1, 1, (VALIDATES,)),
    "tp1-mb2": ("kto", 1, 2, ("model.optim.name=distributed_fused_adam",)),
    "tp1-mb4": ("kto", 1, 4, ()),
    "tp2": ("kto", 2, 2, (TP2,)),
    "pp2": ("kto", 2, 1, (PP2, "model.optim.name=distributed_fused_adam")),
    "dp2": ("kto_sgd", 2, 2, (VALIDATES,)),
    "tp2pp2": ("kto", 4, 2, (TP2, PP2, VALIDATES)),
    "paper-tp1": ("kto_paper", 1, 4, ()),
    "paper-tp2pp2": ("kto_paper", 4, 4, (TP2, PP2, "model.sequence_parallel=true")),
}
"""Recipe, processes, micro-batch size, and what else is asked for."""


def overrides(root: Path, name: str) -> list[str]:
    recipe, devices, micro, extra = RUNS[name]
    words = [word for word in extra if word != VALIDATES]
    if VALIDATES in extra:
        words.append(f"model.data.data_prefix.validation=[{root / 'heldout.jsonl'}]")
    return [
        *RECIPES[recipe].overrides(root),
        f"trainer.devices={devices}",
        f"model.micro_batch_size={micro}",
        f"trainer.kto.val_check_interval={STEPS}",
        "exp_manager.create_checkpoint_callback=false",
        *words,
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_files(tmp_path_factory.mktemp("layouts_cli"))
    rows = records()
    write_records(root / "heldout.jsonl", [*rows[29:], *rows[:4]])  # two batches and a third of three rows
    return root


@pytest.fixture(scope="module")
def run_of(root: Path) -> Iterator[Callable[[str], command_line.Run]]:
    """A run by its name. All are under way, two at a time, and each test waits for its own."""
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(command_line.train, overrides(root, name), root / name) for name in RUNS}
        yield lambda name: futures[name].result()
        for future in futures.values():
            future.cancel()


@pytest.fixture(scope="module")
def oracles(root: Path) -> dict[str, tuple[list[dict], dict[str, torch.Tensor]]]:
    """By recipe, lines and trained weights."""
    found = {}
    for name, recipe in RECIPES.items():
        weights: dict[str, torch.Tensor] = {}
        found[name] = (recipe.oracle_history(root, weights), weights)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_metrics_are_the_oracles(name: str, run_of, oracles) -> None:
    recipe = RUNS[name][0]
    assert RECIPES[recipe].deviations(run_of(name).training, oracles[recipe][0]) == []


@pytest.mark.parametrize("name", ["tp1-mb2", "tp1-mb4", "tp2", "pp2", "tp2pp2", "paper-tp2pp2"])
def test_metrics_are_those_of_one_process(name: str, run_of) -> None:
    recipe = RUNS[name][0]
    alone = run_of("tp1-mb1" if recipe == "kto" else "paper-tp1").training
    keys = ("loss", "kl", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    wanted = [{key: line[key] for key in keys} for line in alone]
    assert RECIPES[recipe].deviations(run_of(name).training, wanted) == []


@pytest.mark.parametrize("name", RUNS)
def test_lines_say_where_the_training_is(name: str, root: Path, run_of) -> None:
    """Types and keys were checked on reading; here the values that the oracle does not have."""
    recipe = RECIPES[RUNS[name][0]]
    samples = oracle.read_samples(recipe.folder(root) / "policy", root / "train.jsonl", SEQ_LENGTH)
    lengths = [len(sample.prompt) + len(sample.response) for sample in samples]
    lines = run_of(name).training
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for i, line in enumerate(lines):
        first = i % 5 * GLOBAL_BATCH  # five batches an epoch, the remainder of three rows is dropped
        assert line["consumed_samples"] == (i + 1) * GLOBAL_BATCH
        assert line["epoch"] == pytest.approx((i + 1) / 5, rel=1e-12)  # one division
        assert line["lr"] == recipe.lr
        assert line["tokens"] == sum(lengths[first : first + GLOBAL_BATCH])
        assert line["step_time_s"] > 0
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["step_time_s"], rel=1e-12)
        assert line["peak_memory_bytes"] > 50 * 2**20  # Python and torch alone are more


@pytest.mark.parametrize("name", RUNS)
def test_a_class_without_rows_has_null_means(name: str, run_of) -> None:
    for line in run_of(name).training:
        nulls = {key for key, value in line.items() if value is None}
        without = {"rewards/chosen", "rewards/margins", "logps/chosen"}
        assert nulls == (without if line["step"] in (4, 9) else set())


def validated(root: Path, recipe: Recipe, weights: dict[str, torch.Tensor]) -> dict:
    """The oracle's validation: pairs and reference point per batch, the loss pooled by class over all rows."""
    folder = recipe.folder(root)
    reference = oracle.Llama.load(folder / "reference")
    policy = oracle.Llama(reference.config, weights)
    words = oracle.Recipe(**recipe.in_oracles_words())
    samples = oracle.read_samples(folder / "policy", root / "heldout.jsonl", SEQ_LENGTH)
    losses: dict[bool, list[float]] = {True: [], False: []}
    points, pairs = [], 0
    with torch.no_grad(), one_thread():
        for first in range(0, len(samples), GLOBAL_BATCH):
            batch = samples[first : first + GLOBAL_BATCH]
            point, found = oracle.reference_point(policy, reference, batch, words)
            outcome = oracle.batch_outcome(policy, reference, batch, words, point, found)
            for sample, reward in zip(batch, outcome.rewards, strict=True):
                gain = reward - point if sample.desirable else point - reward
                losses[sample.desirable].append(1 - 1 / (1 + math.exp(-gain)))
            points += [point] * len(batch)
            pairs += found
    good, bad = (sum(losses[kind]) / len(losses[kind]) for kind in (True, False))
    return {
        "loss": recipe.desirable_weight * good + recipe.undesirable_weight * bad,
        "kl": sum(points) / len(points) / recipe.beta,
        "num_desirable": len(losses[True]),
        "num_undesirable": len(losses[False]),
        "kl_pairs": pairs,
    }


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if VALIDATES in run[3]])
def test_validation_pools_by_class(name: str, root: Path, run_of, oracles) -> None:
    recipe = RUNS[name][0]
    (line,) = run_of(name).validation
    assert (line["step"], line["consumed_samples"]) == (STEPS, STEPS * GLOBAL_BATCH)
    wanted = validated(root, RECIPES[recipe], oracles[recipe][1])
    assert wanted["num_desirable"] + wanted["num_undesirable"] == 2 * GLOBAL_BATCH + 3
    ours = {key: line[f"val/{key}"] for key in wanted}
    assert RECIPES[recipe].deviations([ours], [wanted]) == []
