"""Ten optimizer steps in every layout, against the float64 oracle and against each other. No NeMo, no Lightning.

A case is a recipe (what is computed) and a way of computing it. Each world size is spawned once and runs its cases one
after the other; the tests then look at what the ranks brought back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from allocations import HeadWatch
from harness import Worlds
from trajectory import ADAM, GRADIENT, Job, make_files
from trajectory_cases import AHEAD_2, CASES, LOOKED_AHEAD, RECIPES, RECOMPUTED, Case

pytestmark = pytest.mark.distributed

TRAVEL = {"sgd": GRADIENT, "adamw": 1e-3}
"""Of the way all weights go together. SGD's way is a sum of gradients. Adam divides a gradient by its own size, so an
element that is nothing but rounding may take whole steps in either direction: a few among 180,000 are admitted here.
Storing the weights in float32 costs 2e-5 of steps of 1e-4."""


# ------------------------------------------------------------------------------------------------ on the ranks


def run_case(case: Case, root: Path) -> dict:
    from nemo_kto.distributed import logprobs

    job = Job(case.overrides(root))
    if case.head_rows is None:
        return train(job)
    watch = HeadWatch(job, columns=-(-job.arch.vocab_size // case.tp))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "CHUNK_BYTES", 4 * watch.columns * case.head_rows)
        return {**train(job), "watch": watch.seen}


def train(job: Job) -> dict:
    """Train, as the NeMo model does; metrics by step, the first step's gradients, the trained weights."""
    from nemo_kto.training.metrics import named_means
    from nemo_kto.training.optim import set_learning_rate

    optim, groups = job.config.model.optim, job.groups
    history: list[dict] = []
    gradients = {}
    for batch in job.batches:
        set_learning_rate(job.optimizer, optim.lr, optim.weight_decay)
        job.clear_gradients()
        sums = job.step.train(batch)
        if not history and not (optim.is_distributed and groups.dp_size > 1):  # else each rank has a part of them
            gradients = job.whole(lambda parameter: parameter.main_grad)
        _, norm, _ = job.optimizer.step()
        history.append({**named_means(sums, batch.counts, job.settings.beta), "grad_norm": float(norm)})
    moved = job.swap.bytes_moved
    with job.swap.swapped():  # ends gathers that overlap_param_sync left for a next forward that does not come
        pass
    weights = job.whole(lambda parameter: parameter)
    swaps = moved / (job.swap.bytes_moved - moved)
    return {"history": history, "gradients": gradients, "weights": weights, "swaps": swaps}


def run_world(rank: int, world: int, root: Path) -> dict[str, dict]:
    return {name: run_case(case, root) for name, case in CASES[world].items()}


# ------------------------------------------------------------------------------------------------ what they brought


@dataclass(frozen=True)
class Oracle:
    history: list[dict]
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    start: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("trajectory"))


@pytest.fixture(scope="module")
def oracles(root: Path) -> dict[str, Oracle]:
    import oracle

    found = {}
    for name, recipe in RECIPES.items():
        weights: dict[str, torch.Tensor] = {}
        history = recipe.oracle_history(root, weights)
        start = oracle.Llama.load(recipe.folder(root) / "policy").weights
        found[name] = Oracle(history, weights, recipe.oracle_gradients(root), start)
    return found


@pytest.fixture(scope="module")
def brought(root: Path) -> Callable[[int, str], list[dict]]:
    """What each rank returned for a case of a world."""
    worlds = Worlds(run_world, root, timeout=500)
    return lambda world, name: [rank[name] for rank in worlds(world)]


def joined(ranks: list[dict], key: str) -> dict[str, torch.Tensor]:
    """Tensors of all stages. What several ranks hold, replicas or a tied embedding, must be one, bit for bit."""
    whole: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, tensor in rank[key].items():
            assert name not in whole or torch.equal(whole[name], tensor), f"ranks disagree on {name}"
            whole[name] = tensor
    return whole


def travel_error(ours: dict[str, torch.Tensor], oracle: Oracle) -> float:
    """Norm of the difference between two updates of all weights, relative to the oracle's."""
    assert ours.keys() == oracle.weights.keys()
    squares = [
        ((ours[n].double() - w).square().sum(), (w - oracle.start[n]).square().sum())
        for n, w in oracle.weights.items()
    ]
    return (sum(off for off, _ in squares) / sum(way for _, way in squares)).sqrt().item()


SLOW = {4: pytest.mark.slow}
"""Four ranks on the cores of a small machine."""
every_case = pytest.mark.parametrize(
    ("world", "name"),
    [pytest.param(world, name, marks=SLOW.get(world, ())) for world in CASES for name in CASES[world]],
)


def test_the_oracle_starts_where_it_matters(oracles: dict[str, Oracle]) -> None:
    """KL_ref is in [0.1, 1] in the first steps (design, section 5); the batches hold their traps; training moves."""
    for name, oracle in oracles.items():
        recipe, history = RECIPES[name], oracle.history
        if recipe.preset != "apo_zero_unpaired":
            assert all(0.1 <= recipe.beta * line["kl"] <= 1.0 for line in history[:4]), name
            assert [line["kl_pairs"] for line in history[:5]] == [8, 8, 8, 8, 7]
        assert [line["num_desirable"] for line in history[:5]] == [3, 4, 3, 0, 4]
        assert abs(history[5]["loss"] / history[0]["loss"] - 1) > 0.01  # the same batch, an epoch later
    assert {line["grad_norm"] > ADAM.clip for line in oracles["adam"].history} == {True, False}


@every_case
def test_metrics_follow_the_oracle(world: int, name: str, brought, oracles) -> None:
    recipe = CASES[world][name].recipe
    first, *others = [rank["history"] for rank in brought(world, name)]
    assert all(history == first for history in others)  # whoever writes them, it is the same numbers
    assert RECIPES[recipe].deviations(first, oracles[recipe].history) == []


@every_case
def test_gradients_are_the_oracles(world: int, name: str, brought, oracles) -> None:
    ours = joined(brought(world, name), "gradients")
    if not ours:
        pytest.skip("each rank holds a part of the summed gradients; norm and weights tell")
    wanted = oracles[CASES[world][name].recipe].gradients
    assert ours.keys() == wanted.keys()
    for tensor, gradient in wanted.items():
        assert (ours[tensor].double() - gradient).norm() <= GRADIENT * gradient.norm(), tensor


@every_case
def test_weights_arrive_where_the_oracles_do(world: int, name: str, brought, oracles) -> None:
    recipe = CASES[world][name].recipe
    error = travel_error(joined(brought(world, name), "weights"), oracles[recipe])
    assert error <= TRAVEL[RECIPES[recipe].optimizer]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("worlds", [(1, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)])
def test_layouts_agree_with_each_other(worlds: tuple[int, ...], recipe: str, brought) -> None:
    """Every way of computing a recipe against the first: the oracle's float64 is out of the comparison."""
    ways = [(world, name) for world in worlds for name, case in CASES[world].items() if case.recipe == recipe]
    assert len(ways) >= len(worlds)
    first, *others = [brought(*way)[0]["history"] for way in ways]
    assert [RECIPES[recipe].deviations(history, first) for history in others] == [[]] * len(others)


@pytest.mark.parametrize(
    ("world", "name"),
    [
        pytest.param(world, name, marks=SLOW.get(world, ()))
        for world in CASES
        for name, case in CASES[world].items()
        if case.head_rows
    ],
)
def test_logits_exist_by_the_chunk_only(world: int, name: str, brought) -> None:
    case = CASES[world][name]
    watched = [rank["watch"] for rank in brought(world, name)]
    with_head = [seen for seen in watched if seen["rows"]]
    assert all(seen["largest"] < seen["logits"] for seen in watched)
    assert len(with_head) == world // case.pp
    # a buffer in each micro-batch's forward and another in its backward, for many chunks
    assert all(len(seen["rows"]) == 2 * seen["micro_batches"] for seen in with_head)
    assert max(max(seen["rows"]) for seen in with_head) <= case.head_rows


def assert_bit_equal(ones: list[dict], others: list[dict]) -> None:
    """Metrics of every step and weights at the end, on every rank."""
    for one, other in zip(ones, others, strict=True):
        assert one["history"] == other["history"]
        assert one["weights"].keys() == other["weights"].keys()
        assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())


@pytest.mark.parametrize(("world", "plain", "recomputed"), RECOMPUTED)
def test_recomputing_activations_changes_no_bit(world: int, plain: str, recomputed: str, brought) -> None:
    assert_bit_equal(brought(world, plain), brought(world, recomputed))


@pytest.mark.parametrize(("world", "plain"), LOOKED_AHEAD)
def test_looking_ahead_changes_no_bit(world: int, plain: str, brought) -> None:
    assert_bit_equal(brought(world, plain), brought(world, f"{plain}-ahead"))
    assert {rank["swaps"] for rank in brought(world, plain)} == {10}
    window = 2 if AHEAD_2[0] in CASES[world][f"{plain}-ahead"].extra else 3
    assert {rank["swaps"] for rank in brought(world, f"{plain}-ahead")} == {math.ceil(10 / window)}
