"""Ten optimizer steps in every layout, against the float64 oracle and against each other. No NeMo, no Lightning.

A case is a recipe (what is computed) and a way of computing it. Each world size is spawned once and runs its cases one
after the other; the tests then look at what the ranks brought back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from harness import Worlds
from trajectory import ADAM, GRADIENT, PAPER, SGD, Job, make_files

pytestmark = pytest.mark.distributed

RECIPES = {
    "sgd": SGD,
    "adam": ADAM,
    "paper": PAPER,
    "paper_sgd_sft": replace(SGD, preset="kto_paper", lr=0.01, sft_weight=0.05),
    "averages": replace(ADAM, beta=2.0, average=True, sft_average=True, sft_weight=0.3),
    "apo": replace(ADAM, preset="apo_zero_unpaired"),
    "tied": replace(ADAM, tied=True),
    "tied_sgd": replace(SGD, tied=True, desirable_weight=1.0, undesirable_weight=1.0),
}
DIST = "model.optim.name=distributed_fused_adam"
OVERLAP_GRADS = "model.optim.overlap_grad_sync=true"
OVERLAP = (DIST, OVERLAP_GRADS, "model.optim.overlap_param_sync=true")
SEQUENCE = "model.sequence_parallel=true"
SELECTIVE = "model.activations_checkpoint_granularity=selective"
FULL = (
    "model.activations_checkpoint_granularity=full",
    "model.activations_checkpoint_method=uniform",
    "model.activations_checkpoint_num_layers=1",
)
# The same objective said in other words: the preference weight multiplies both classes' weights.
HALVED = (
    "model.kto.preference_loss_weight=0.5",
    "model.kto.desirable_loss_weight=3.0",
    "model.kto.undesirable_loss_weight=2.5",
)
SCORE_4 = "model.kto.log_prob_forward_micro_batch_size=4"
AHEAD_2, AHEAD_3 = ("model.kto.reference_lookahead=2",), ("model.kto.reference_lookahead=3",)
"""Ten steps, two epochs, are windows of 2 2 2 2 2, and of 3 3 3 1: over the end of an epoch, and cut at the end."""


def layout_words(tp: int, pp: int, micro: int) -> list[str]:
    """The command line's words for how a recipe is computed."""
    return [
        f"model.tensor_model_parallel_size={tp}",
        f"model.pipeline_model_parallel_size={pp}",
        f"model.micro_batch_size={micro}",
    ]


@dataclass(frozen=True)
class Case:
    recipe: str
    tp: int = 1
    pp: int = 1
    micro: int = 2
    extra: tuple[str, ...] = ()

    def overrides(self, root: Path) -> list[str]:
        return [*RECIPES[self.recipe].overrides(root), *layout_words(self.tp, self.pp, self.micro), *self.extra]


CASES = {
    1: {
        "mb1": Case("sgd", micro=1),
        "mb2": Case("sgd"),
        "mb4": Case("sgd", micro=4),
        "mb2-score4": Case("sgd", extra=(SCORE_4,)),
        "mb2-ahead": Case("sgd", extra=AHEAD_3),
        "mb2-score4-ahead": Case("sgd", extra=(SCORE_4, *AHEAD_2)),
        "mb2-selective": Case("sgd", extra=(SELECTIVE,)),
        "mb2-full": Case("sgd", extra=FULL),
        "adam-mb4": Case("adam", micro=4),
        "dist-mb4": Case("adam", micro=4, extra=(DIST,)),
        "paper": Case("paper", extra=HALVED),
        "paper_sgd_sft-mb1": Case("paper_sgd_sft", micro=1),
        "averages": Case("averages"),
        "apo-mb4": Case("apo", micro=4),
        "tied": Case("tied", extra=(DIST,)),
        "tied_sgd": Case("tied_sgd"),
    },
    2: {
        "dp2-mb1": Case("sgd", micro=1),
        "dp2-paper": Case("paper"),
        "dp2-dist-overlap": Case("adam", micro=1, extra=OVERLAP),
        "dp2-dist-overlap-ahead": Case("adam", micro=1, extra=(*OVERLAP, *AHEAD_3)),
        "dp2-apo": Case("apo", micro=1),
        "dp2-averages": Case("averages", extra=(DIST, OVERLAP_GRADS)),
        "pp2-mb1": Case("sgd", pp=2, micro=1),
        "pp2-tied": Case("tied", pp=2, extra=(DIST,)),
        "pp2-tied_sgd": Case("tied_sgd", pp=2, micro=1),
        "pp2-paper-score4": Case("paper", pp=2, extra=(SCORE_4,)),
        "pp2-mb1-ahead": Case("sgd", pp=2, micro=1, extra=AHEAD_3),
        "pp2-full": Case("sgd", pp=2, micro=1, extra=FULL),
        "tp2-mb2": Case("sgd", tp=2),
        "tp2-tied": Case("tied", tp=2, micro=4),
        "tp2-paper_sgd_sft": Case("paper_sgd_sft", tp=2, micro=1),
        "tp2sp-adam": Case("adam", tp=2, extra=(SEQUENCE,)),
        "tp2sp-averages": Case("averages", tp=2, micro=4, extra=(SEQUENCE,)),
        "tp2sp-sgd": Case("sgd", tp=2, extra=(SEQUENCE,)),
        "tp2sp-sgd-ahead": Case("sgd", tp=2, extra=(SEQUENCE, *AHEAD_2)),
        "tp2sp-full": Case("sgd", tp=2, extra=(SEQUENCE, *FULL)),
        "tp2sp-selective": Case("sgd", tp=2, extra=(SEQUENCE, SELECTIVE)),
    },
    4: {
        "dp4": Case("paper", extra=OVERLAP),
        "pp2dp2": Case("paper", pp=2, micro=1, extra=OVERLAP),
        "pp2dp2-tied_sgd": Case("tied_sgd", pp=2, extra=(OVERLAP_GRADS, SCORE_4)),
        "tp2dp2-sgd": Case("sgd", tp=2, extra=(OVERLAP_GRADS,)),
        "tp2spdp2-averages": Case("averages", tp=2, micro=4, extra=(SEQUENCE, *OVERLAP)),
        "tp2pp2-sgd": Case("sgd", tp=2, pp=2),
        "tp2pp2-adam": Case("adam", tp=2, pp=2, micro=4, extra=(DIST,)),
        "tp2pp2-paper_sgd_sft": Case("paper_sgd_sft", tp=2, pp=2, micro=4),
        "tp2pp2sp-tied": Case("tied", tp=2, pp=2, extra=(SEQUENCE, *OVERLAP)),
        "tp2pp2sp-apo": Case("apo", tp=2, pp=2, micro=4, extra=(SEQUENCE,)),
    },
}
RECOMPUTED = [
    (1, "mb2", "mb2-selective"),
    (1, "mb2", "mb2-full"),
    (2, "pp2-mb1", "pp2-full"),
    (2, "tp2sp-sgd", "tp2sp-full"),
    (2, "tp2sp-sgd", "tp2sp-selective"),
]
LOOKED_AHEAD = [(1, "mb2"), (1, "mb2-score4"), (2, "dp2-dist-overlap"), (2, "pp2-mb1"), (2, "tp2sp-sgd")]
TRAVEL = {"sgd": GRADIENT, "adamw": 1e-3}
"""Of the way all weights go together. SGD's way is a sum of gradients. Adam divides a gradient by its own size, so an
element that is nothing but rounding may take whole steps in either direction: a few among 180,000 are admitted here.
Storing the weights in float32 costs 2e-5 of steps of 1e-4."""


# ------------------------------------------------------------------------------------------------ on the ranks


def run_case(case: Case, root: Path) -> dict:
    """Train, as the NeMo model does; metrics by step, the first step's gradients, the trained weights."""
    from nemo_kto.training.metrics import named_means
    from nemo_kto.training.optim import set_learning_rate

    job = Job(case.overrides(root))
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


every_case = pytest.mark.parametrize(("world", "name"), [(world, name) for world in CASES for name in CASES[world]])


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
def test_layouts_agree_with_each_other(recipe: str, brought) -> None:
    """Every way of computing a recipe against the first: the oracle's float64 is out of the comparison."""
    ways = [(world, name) for world in CASES for name, case in CASES[world].items() if case.recipe == recipe]
    assert len(ways) >= 3
    first, *others = [brought(*way)[0]["history"] for way in ways]
    assert [RECIPES[recipe].deviations(history, first) for history in others] == [[]] * len(others)


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
