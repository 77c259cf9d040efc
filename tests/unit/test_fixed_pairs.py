"""Partners that stay: the rule of objective/pairing.py over all rows, and the same pairs in every epoch."""

from __future__ import annotations

import time

import numpy as np
import pytest
from data_kit import make_store, random_rows

from nemo_kto.data.collate import BatchLayout, collate_step
from nemo_kto.data.fixed_pairs import NONE, fixed_partners
from nemo_kto.data.sampler import GlobalBatchSampler, epoch_order
from nemo_kto.objective.pairing import mismatched_partners


class Columns:
    """The parts of a store that are read: small keys, so that many rows share one."""

    def __init__(self, prompts, responses) -> None:
        self.prompt_keys, self.response_keys = (
            np.array([[7, k] for k in keys], np.uint64).reshape(-1, 2) for keys in (prompts, responses)
        )


@pytest.mark.parametrize("kinds", [1, 2, 3, 10])
def test_the_rule_is_that_of_a_batch_over_all_rows(kinds):
    rng = np.random.default_rng(kinds)
    for size in [*range(1, 12), 60]:
        prompts, responses = rng.integers(kinds, size=size), rng.integers(3, size=size)
        order = rng.permutation(size)
        found = fixed_partners(Columns(prompts, responses), order)
        places = mismatched_partners(prompts[order].tolist(), responses[order].tolist())
        wanted = dict(zip(order.tolist(), [NONE if m is None else order[m] for m in places], strict=True))
        assert found.tolist() == [wanted[row] for row in range(size)]


def test_many_rows_take_no_loop():
    rng = np.random.default_rng(0)
    size = 200_000
    columns = Columns([], [])
    columns.prompt_keys = np.repeat(rng.integers(2**60, size=(size // 4, 2), dtype=np.uint64), 4, axis=0)
    columns.response_keys = rng.integers(2, size=(size, 2), dtype=np.uint64)
    began = time.process_time()
    partners = fixed_partners(columns, np.arange(size))
    assert time.process_time() - began < 2.0  # 0.2 are usual; a loop over rows takes longer
    assert (columns.prompt_keys[partners] != columns.prompt_keys).any(axis=1).all()
    assert (columns.response_keys[partners] != columns.response_keys).any(axis=1).all()


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store", random_rows(22, prompts=9))


def _pairs(store, sampler, steps, **changes) -> dict[int, tuple[list[int], bool]]:
    """Row of the store -> the pair's scored ids, and whether it counts; the same wherever a row turns up."""
    partners = fixed_partners(store, sampler.first_order)
    layout = BatchLayout(0, 1, 2, 0, 64, 1, needs_kl=True, fixed_partners=partners)
    found: dict[int, tuple[list[int], bool]] = {}
    for step in steps:
        for batch in collate_step(store, sampler.batch_indices(step), layout):
            for i, row in enumerate(batch.index.tolist()):
                labels = batch.kl_rows.labels[i]
                pair = (labels[batch.kl_rows.response_mask[i]].tolist(), bool(batch.has_partner[i]))
                assert found.setdefault(row, pair) == pair
    return found


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_the_same_pairs(store, shuffle):
    sampler = GlobalBatchSampler(len(store), 4, seed=3, shuffle=shuffle)
    pairs = _pairs(store, sampler, range(5 * 6))
    order = epoch_order(len(store), 3, 0) if shuffle else np.arange(len(store))
    partners = fixed_partners(store, order)
    assert len(pairs) > 20 or not shuffle
    for row, (response, counts) in pairs.items():
        assert counts == (partners[row] != NONE)
        assert response == store.response(partners[row]).tolist()


def test_partners_reach_beyond_the_batch_and_the_rows_that_no_batch_has(store):
    sampler = GlobalBatchSampler(len(store), 4, seed=3, shuffle=False)
    assert sampler.first_order.tolist() == list(range(22))
    partners = fixed_partners(store, sampler.first_order)
    assert partners[3] >= 4
    assert partners[19] in (20, 21)


def test_without_room_or_partner_a_pair_does_not_count(tmp_path):
    store = make_store(tmp_path / "s", [([5] * 4, [1], True), ([6], [2], True), ([7], [2], False)])
    partners = np.array([1, 0, NONE])
    layout = BatchLayout(0, 1, 3, 0, 4, 1, needs_kl=True, fixed_partners=partners)
    (batch,) = collate_step(store, np.arange(3), layout)
    assert batch.has_partner.tolist() == [False, True, False]
    assert collate_step(store, np.arange(3), layout).counts.num_kl_pairs == 1
