"""The order of the data: a pure function of (seed, step), the same on every machine, resumable anywhere."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from nemo_kto.data.sampler import GlobalBatchSampler, epoch_order
from nemo_kto.errors import DataError

PINNED_EPOCH_0 = [7, 3, 0, 1, 4, 2, 5, 6]
PINNED_EPOCH_1 = [0, 5, 6, 4, 2, 1, 7, 3]


def sampler(num_samples=23, global_batch_size=4, **changes) -> GlobalBatchSampler:
    return GlobalBatchSampler(num_samples, global_batch_size, **{"seed": 7, "shuffle": True, **changes})


def test_order_is_pinned():
    """Another order after an upgrade would break resumed runs: these numbers must never change."""
    assert epoch_order(8, seed=1234, epoch=0).tolist() == PINNED_EPOCH_0
    assert epoch_order(8, seed=1234, epoch=1).tolist() == PINNED_EPOCH_1
    assert epoch_order(8, seed=1234, epoch=0).dtype == np.int64


def test_file_order():
    plain = sampler(shuffle=False)
    assert plain.batch_indices(0).tolist() == [0, 1, 2, 3]
    assert plain.batch_indices(4).tolist() == [16, 17, 18, 19]
    assert plain.batch_indices(5).tolist() == [0, 1, 2, 3], "the next epoch"


def test_an_epoch_visits_every_row_at_most_once():
    shuffled = sampler()
    assert (shuffled.steps_per_epoch, shuffled.dropped_per_epoch) == (5, 3)
    for epoch in range(3):
        rows = np.concatenate([shuffled.batch_indices(5 * epoch + k) for k in range(5)])
        assert len(set(rows.tolist())) == 20
        assert set(rows.tolist()) <= set(range(23))
        assert rows.tolist() == epoch_order(23, 7, epoch)[:20].tolist()


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}
    assert len(orders) == 6
    assert epoch_order(50, -1, 0).tolist() != epoch_order(50, 1, 0).tolist()


def test_any_step_from_a_fresh_sampler():
    walker = sampler()
    through = [walker.batch_indices(step).tolist() for step in range(17)]
    backwards = {step: walker.batch_indices(step).tolist() for step in reversed(range(17))}
    for step in range(17):
        assert sampler().batch_indices(step).tolist() == through[step] == backwards[step]
        assert walker.epoch_of(step) == step // 5
        assert walker.step_at(4 * step) == step


def test_consumed_samples_of_another_batch_size():
    with pytest.raises(DataError, match=r"6 samples have been consumed, no multiple of model.global_batch_size=4"):
        sampler().step_at(6)


def test_validation_keeps_the_remainder():
    validation = sampler(shuffle=False, drop_last=False)
    assert (validation.steps_per_epoch, validation.dropped_per_epoch) == (6, 0)
    assert validation.batch_indices(5).tolist() == [20, 21, 22]
    small = sampler(num_samples=2, shuffle=False, drop_last=False)
    assert (small.steps_per_epoch, small.batch_indices(0).tolist()) == (1, [0, 1])


@pytest.mark.parametrize(
    ("limit", "steps"), [(1.0, 5), (0.5, 2), (0.2, 1), (3, 3), (1, 1), (99, 5), (2.0, 5), (0, 0), (0.0, 0)]
)
def test_limits(limit, steps):
    limited = sampler(limit_batches=limit)
    assert limited.steps_per_epoch == steps
    if steps:
        assert limited.batch_indices(steps).tolist() == epoch_order(23, 7, 1)[:4].tolist()


def test_a_limit_that_leaves_nothing():
    with pytest.raises(DataError, match=r"0.1 of 5 global batches is less than one; raise limit_train_batches"):
        sampler(limit_batches=0.1)


def test_too_few_rows():
    with pytest.raises(DataError, match=r"holds 3 rows, fewer than model.global_batch_size=4.* at most 3"):
        sampler(num_samples=3)
    assert sampler(num_samples=4).steps_per_epoch == 1


def test_order_is_computed_once_per_epoch_and_not_pickled(monkeypatch):
    calls = []
    monkeypatch.setattr("nemo_kto.data.sampler.epoch_order", lambda *a: calls.append(a) or epoch_order(*a))
    big = sampler(num_samples=100_000)
    for step in range(10):
        big.batch_indices(step)
    assert len(calls) == 1
    copy = pickle.loads(pickle.dumps(big))
    assert len(pickle.dumps(big)) < 1000
    assert copy.batch_indices(3).tolist() == big.batch_indices(3).tolist()
