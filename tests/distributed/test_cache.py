"""The cache on two ranks: the swap's numbers, shared between replicas and layouts, and entered by all or none."""

from __future__ import annotations

import pytest
import tiny
import training_kit as kit
from cache_cases import SETUPS, STEPS, two_ranks
from harness import run_ranks

pytestmark = pytest.mark.distributed

ROWS = 2 * kit.GLOBAL_BATCH * len(STEPS)  # samples and pairs
ROUNDING = 2e-5
"""Nats, in float32: a sum of 4 to 9 log-probs of some 6 nats, each off by a few float32 units in the last place (5e-7
there) where matrix products add up in another order."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    for number, name in enumerate(("policy", "reference")):
        tiny.make_model(root / f"tied-{name}", seed=number, tie_word_embeddings=True, **kit.SIZES)
    return run_ranks(2, two_ranks, root, timeout=400)


@pytest.mark.parametrize("name", SETUPS)
def test_cold_and_warm_numbers_are_the_swaps_bit_for_bit(name, results):
    """Same layout, same groups of rows."""
    for found in kit.of(results, f"own {name}"):
        assert found["bit-equal"]
        assert found["asked"] == 2 * ROWS
        assert found["computed"] == (ROWS, 0)
        assert found["entered"] == (len(STEPS), 0)
    assert max(found["columns"] for found in kit.of(results, f"own {name}")) > 0


@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_entries_of_one_layout_serve_another(name, results):
    for found in kit.of(results, f"foreign {name}"):
        assert (found["computed"], found["entered"]) == (0, 0)
        assert found["off by"] < ROUNDING


def test_all_ranks_enter_the_reference_or_none(results):
    """Four rows are new on one rank, then none anywhere, then four pairs on that rank alone."""
    first, second = kit.of(results, "one misses")
    assert first == {"scored": [0, 0], "computed": 8}
    assert second == {"scored": [4, 4], "computed": 8}


def test_of_a_group_that_is_partly_known_the_others_are_scored(results):
    """Known: a row. New: its neighbour, which comes twice more, and one whose neighbour has nothing to score."""
    for found in kit.of(results, "partly"):
        assert found["off by"] < ROUNDING
        assert found["silent"] == 0.0
        assert found["twice"]
        assert found["again"]
        assert found["rows"] == [1, 1 + 2 + 2]
        assert found["computed"] == 1 + 4


@pytest.mark.parametrize("name", ["trains", "trains overlap"])
def test_training_with_a_cache_is_training_with_the_swap(name, results):
    for found in kit.of(results, name):
        assert found["cold"]
        assert found["warm"]
        assert (found["cold entered"], found["warm entered"], found["warm moved"]) == (6, 0, 0)


@pytest.mark.parametrize("name", ["late", "late tp2"])
def test_reference_weights_are_read_when_they_are_needed(name, results):
    for found in kit.of(results, name):
        assert all(found.values()), found
