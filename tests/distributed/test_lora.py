"""LoRA in every layout against PEFT on transformers in float64: metrics, gradients, where the adapters arrive.

Then, by counting, what trains and what does not; and checkpoints from one layout to another. Every world is spawned
once and runs all of its cases when the first test asks for one. The oracle starts from the numbers that the first case
of a recipe started from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lora_state_cases as state
import pytest
import torch
from harness import Worlds
from lora_cases import CASES, RECIPES, WITHOUT_ORACLE, run_case
from lora_oracle import Outcome, run_lora_oracle, write_earlier
from lora_runs import APART, make_lora_files
from test_trajectory import joined
from training_kit import each, of
from trajectory import GRADIENT
from trajectory_cases import DIST

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TRAVEL = {"sgd": GRADIENT, "adamw": 1e-3}
"""Of the way all adapters go together, for the reasons given in ``test_trajectory.py``."""
SHARERS = ("k_proj.lora_A.weight", "v_proj.lora_A.weight", "up_proj.lora_A.weight")
"""PEFT's names of what is the A of another module here."""


# ------------------------------------------------------------------------------------------------ on the ranks


def run_world(rank: int, world: int, root: Path) -> dict[str, Any]:
    """Trajectories and the rest; a case that raises leaves its traceback, and the others still run."""
    trajectories = {name: lambda rank, root, case=case: run_case(case, root) for name, case in CASES[world].items()}
    return each({**trajectories, **state.CASES[world]}, rank, root)


# ------------------------------------------------------------------------------------------------ what they brought


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_lora_files(tmp_path_factory.mktemp("lora"))
    write_earlier(folder, RECIPES["swap"])
    return folder


@pytest.fixture(scope="module")
def brought(root: Path) -> Callable[[int, str], list[Any]]:
    """What each rank returned for a case of a world. The others read checkpoints that two ranks write."""
    worlds = Worlds(run_world, root, timeout=550)

    def found(world: int, name: str) -> list[Any]:
        worlds(2)
        return of(worlds(world), name)

    return found


@pytest.fixture(scope="module")
def oracle_of(root: Path, brought) -> Callable[[str], Outcome]:
    @cache
    def outcome(recipe: str) -> Outcome:
        first = next(name for name, case in CASES[1].items() if case.recipe == recipe)
        return run_lora_oracle(RECIPES[recipe], root, joined(brought(1, first), "start"))

    return outcome


every_case = pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world in CASES for name in CASES[world]], ids=lambda value: str(value)
)
cases_with_oracle = pytest.mark.parametrize(
    ("world", "name"),
    [(world, name) for world in CASES for name, case in CASES[world].items() if case.recipe not in WITHOUT_ORACLE],
)


def test_the_oracle_starts_where_it_matters(oracle_of) -> None:
    """Adapters that are 0 at the start or never move would make every layout look right."""
    for name in ("sgd", "adam", "normal", "some"):
        found = oracle_of(name)
        assert found.history[-1]["loss"] < 0.95 * found.history[0]["loss"], name
        flat = {key for key, gradient in found.gradients.items() if gradient.abs().max() < 1e-6}
        assert flat == ({key for key in flat if "lora_A" in key} if RECIPES[name].row_init == "zero" else set())
        assert (len(flat) == len(found.gradients) / 2) == (RECIPES[name].row_init == "zero")
    assert 0.1 <= RECIPES["normal"].objective.beta * oracle_of("normal").history[0]["kl"] <= 1.0
    norms = [line["grad_norm"] for line in oracle_of("adam").history]
    assert min(norms) < RECIPES["adam"].objective.clip < max(norms)


@every_case
def test_every_layout_starts_from_the_same_numbers(world: int, name: str, brought) -> None:
    recipe = CASES[world][name].recipe
    first = next(other for other, case in CASES[1].items() if case.recipe == recipe)
    ours, wanted = joined(brought(world, name), "start"), joined(brought(1, first), "start")
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in ours.items())


@every_case
def test_before_the_first_step_nothing_differs_from_itself(world: int, name: str, brought) -> None:
    """Where the policy is its reference: every layout, both kinds of reference. Dropout moves the policy alone."""
    recipe = RECIPES[CASES[world][name].recipe]
    if not recipe.starts_at_its_reference or recipe.dropout:
        pytest.skip("the policy starts elsewhere")
    first = brought(world, name)[0]["history"][0]
    objective = recipe.objective
    assert first["loss"] == (objective.desirable_weight + objective.undesirable_weight) / 2
    assert first["kl"] == first["rewards/chosen"] == first["rewards/rejected"] == 0.0


@cases_with_oracle
def test_metrics_follow_the_oracle(world: int, name: str, brought, oracle_of) -> None:
    recipe = CASES[world][name].recipe
    first, *others = [rank["history"] for rank in brought(world, name)]
    assert all(history == first for history in others)
    assert RECIPES[recipe].objective.deviations(first, oracle_of(recipe).history) == []


@cases_with_oracle
def test_gradients_are_the_oracles(world: int, name: str, brought, oracle_of) -> None:
    """Each half apart. Where B is 0, A's gradient is exactly 0."""
    ours = joined(brought(world, name), "gradients")
    if not ours:
        pytest.skip("each rank holds a part of the summed gradients; norm and adapters tell")
    wanted = oracle_of(CASES[world][name].recipe).gradients
    assert ours.keys() == wanted.keys()
    for tensor, gradient in wanted.items():
        assert (ours[tensor].double() - gradient).norm() <= GRADIENT * gradient.norm(), tensor


@cases_with_oracle
def test_adapters_arrive_where_the_oracles_do(world: int, name: str, brought, oracle_of) -> None:
    recipe = CASES[world][name].recipe
    ours, oracle = joined(brought(world, name), "adapters"), oracle_of(recipe)
    assert ours.keys() == oracle.adapters.keys()
    off = sum((ours[key].double() - wanted).square().sum() for key, wanted in oracle.adapters.items())
    way = sum((wanted - oracle.start[key]).square().sum() for key, wanted in oracle.adapters.items())
    assert (off / way).sqrt() <= TRAVEL[RECIPES[recipe].objective.optimizer]


@pytest.mark.parametrize(
    ("world", "plain", "recomputed"), [(1, "dropout", "dropout-full"), (2, "tp2sp-dropout", "tp2sp-dropout-full")]
)
def test_recomputation_drops_the_same_inputs(world: int, plain: str, recomputed: str, brought) -> None:
    """Other ones would show as 1e-1. Gradients may be laid out otherwise in memory, and products round otherwise."""
    one, other = (brought(world, name)[0]["history"] for name in (plain, recomputed))
    assert RECIPES["dropout"].objective.deviations(other, one) == []


def test_dropout_acts_on_training_passes_alone(brought) -> None:
    plain, dropped = (brought(1, name)[0]["history"][0] for name in ("sgd", "dropout"))
    assert abs(dropped["grad_norm"] / plain["grad_norm"] - 1) > 0.01
    assert dropped["kl"] == 0.0


# ------------------------------------------------------------------------------------------------ what has state

FOOTPRINTS = [(1, "plain footprint"), (2, "sharded footprint"), (1, "bf16 base"), (2, "bf16 base")]


@pytest.mark.parametrize(("world", "name"), FOOTPRINTS)
def test_only_adapters_have_gradients_and_state(world: int, name: str, brought) -> None:
    for seen in brought(world, name):
        assert seen["moved"]
        assert seen["base kept"]
        assert seen["trained are the adapters"]
        assert seen["base with gradient"] == []
        assert seen["buffer tensors"] == seen["adapter tensors"]
        # bytes of gradients, masters and moments go with these counts: 12 an element in float32
        assert seen["base numel"] > 10 * seen["adapter numel"]
        # the distributed optimizer's buffers start every tensor at 64 elements and end at 128 per data-parallel rank
        padding = 0 if name == "plain footprint" else 64 * seen["adapter tensors"] + 256
        assert 0 <= seen["buffer numel"] - seen["adapter numel"] <= padding
    everyone = brought(world, name)
    shards = 2 if name == "sharded footprint" else 1
    for key, per_element in (("optimized numel", 1), ("moments numel", 2)):  # Adam's
        wanted = sum(per_element * seen["adapter numel"] for seen in everyone) / shards
        assert sum(seen[key] for seen in everyone) == wanted, key


@pytest.mark.parametrize("world", [1, 2])
def test_the_base_may_be_in_bfloat16(world: int, brought) -> None:
    for seen in brought(world, "bf16 base"):
        assert seen["base dtypes"] == {torch.bfloat16}
        assert seen["adapter dtypes"] == seen["moments dtypes"] == {torch.float32}
        first, second = seen["history"]
        assert first["loss"] == 1.375  # exact in bfloat16 too: policy and reference are one function
        assert first["kl"] == 0.0
        assert second["loss"] != first["loss"]


@pytest.mark.parametrize("world", [1, 2])
def test_switched_off_adapters_leave_the_base(world: int, brought) -> None:
    for seen in brought(world, "base as reference"):
        assert seen["equal"]
        assert seen["differ"]
        assert seen["inside"] == {False}
        assert seen["after"] == (False, {True})
        assert seen["after an error"] == (False, True)


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("recipe", state.RELAYS)
def test_layouts_take_over_from_each_other(recipe: str, brought, oracle_of) -> None:
    """Three legs in three layouts are the oracle's six steps, optimizer state included."""
    history = brought(2, f"relay {recipe}")[0]["history"]
    assert RECIPES[recipe].objective.deviations(history, oracle_of(recipe).history) == []


@pytest.mark.parametrize(
    ("world", "recipe"), [(world, name) for world, heirs in state.TAKEN_OVER.items() for name in heirs]
)
def test_other_worlds_take_over(world: int, recipe: str, brought, oracle_of) -> None:
    history = brought(world, f"taken over {recipe}")[0]
    assert RECIPES[recipe].objective.deviations(history, oracle_of(recipe).history[state.LEG :]) == []


def test_resuming_in_the_same_layout_changes_no_bit(brought) -> None:
    for seen in brought(2, "resumed"):
        assert seen["equal"]
        assert seen["history"][0] == seen["history"][1]


def test_what_does_not_fit_is_refused(brought, root: Path) -> None:
    for seen in brought(2, "refusals"):
        assert {seen[name][0] for name in seen if name != "good"} == {"CheckpointError"}
        assert "belong to other base weights" in seen["other base"][1]
        assert str(root / "other") in seen["other base"][1]
        assert "holds adapters alone" in seen["as a network"][1]
        assert "holds no adapters" in seen["a network"][1]
        assert str(state.baton(root, "adam", 0)) in seen["other rank"][1]
        assert seen["good"] == ("", "")


def test_a_whole_checkpoint_has_the_bases_names(brought) -> None:
    assert brought(1, "whole network") == [True]


@pytest.mark.parametrize("recipe", state.RELAYS)
def test_checkpoints_hold_adapters_alone_and_export_to_them(recipe: str, brought, root: Path) -> None:
    """Besides them Adam's two moments, the distributed optimizer's masters, and nothing."""
    from safetensors.torch import load_file
    from torch.distributed.checkpoint import FileSystemReader

    saved = joined([{"first": rank["adapters"][0]} for rank in brought(2, f"relay {recipe}")], "first")
    (out,) = brought(1, f"exported {recipe}")
    found = load_file(Path(out) / "adapter_model.safetensors")
    assert found.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in found.items())
    stored = FileSystemReader(state.baton(root, recipe, 0)).read_metadata().state_dict_metadata
    assert all("lora." in name for name in stored)
    numel = sum(tensor.numel() for name, tensor in saved.items() if not name.endswith(SHARERS))
    copies = 4 if DIST in state.RELAYS[recipe][0].extra else 3
    assert sum(tensor.size.numel() for tensor in stored.values()) == copies * numel


def test_a_stage_may_be_without_adapters_where_nothing_trains(brought) -> None:
    first, last = brought(2, "on one stage")
    assert first["whole"].keys() == first["saved"].keys()
    assert all(torch.equal(tensor, first["saved"][name]) for name, tensor in first["whole"].items())
    assert last["whole"] == {}
    for name in ("added", "merged"):
        assert len(last[name]) == len(last["wanted"]) > 0
        for found, wanted in zip(last[name], last["wanted"], strict=True):
            # float32, sums in another order, of some 20 log-probs near -5 nats
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("world", "name"), [(2, "peft tp2"), (2, "peft pp2"), (4, "peft tp2pp2")])
def test_adapters_of_peft_at_any_layout(world: int, name: str, brought, root: Path) -> None:
    """The product of the halves, module by module. k_proj and up_proj have no adapter, and so none here."""
    from safetensors.torch import load_file

    stored = load_file(root / APART / "adapter_model.safetensors")
    ours = joined([{"whole": rank} for rank in brought(world, name)], "whole")
    for key, a in ours.items():
        if "lora_A" not in key:
            continue
        product = ours[key.replace("lora_A", "lora_B")] @ a
        wanted = torch.zeros_like(product)
        if key in stored:
            wanted = (stored[key.replace("lora_A", "lora_B")] @ stored[key]).float()
        assert (key in stored) == ("k_proj" not in key and "up_proj" not in key)
        torch.testing.assert_close(product, wanted, rtol=1e-5, atol=1e-6)  # sums of four products of float32
