"""Pairs and orders: every pair mismatched or reported, every epoch a permutation, all of it a pure function."""

from __future__ import annotations

import pickle

import fuzz_kit  # noqa: F401 - how to search
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nemo_kto.data.sampler import GlobalBatchSampler, epoch_order
from nemo_kto.objective.pairing import mismatched_partners

SEEDS = st.integers(-(2**63), 2**64)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=24))
def test_every_pair_is_mismatched_or_reported(samples):
    prompts, responses = [prompt for prompt, _ in samples], [response for _, response in samples]
    found = mismatched_partners(prompts, responses)
    assert len(found) == len(samples)
    for i, partner in enumerate(found):
        fits = [
            d
            for d in range(1, len(samples))
            if samples[(i + d) % len(samples)][0] != prompts[i] and samples[(i + d) % len(samples)][1] != responses[i]
        ]
        if partner is None:
            assert fits == [], "a sample is reported as lonely though another one differs in both"
        else:
            assert (partner - i) % len(samples) == fits[0], "not the next one, in cyclic order, that differs in both"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12), st.integers(0, 11))
def test_pairing_turns_with_the_circle(samples, turn):
    """Where the batch begins does not matter, nor what the keys are."""
    turn %= len(samples)
    turned = samples[turn:] + samples[:turn]
    found = mismatched_partners(*zip(*samples, strict=True))
    other = mismatched_partners(*zip(*[(f"p{p}", bytes([r])) for p, r in turned], strict=True))
    back = [None if m is None else (m + turn) % len(samples) for m in other]
    assert back[-turn:] + back[:-turn] == found if turn else back == found


@given(num=st.integers(1, 400), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(num, seed, epoch):
    order = epoch_order(num, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(num))
    assert np.array_equal(order, epoch_order(num, seed, epoch))


@given(
    num=st.integers(1, 60),
    size=st.integers(1, 20),
    seed=SEEDS,
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    steps=st.lists(st.integers(0, 200), min_size=1, max_size=8),
)
def test_batches_are_a_pure_function_of_seed_and_step(num, size, seed, shuffle, drop_last, steps):
    if drop_last and num < size:
        return

    def sampler() -> GlobalBatchSampler:
        return GlobalBatchSampler(num, size, seed=seed, shuffle=shuffle, drop_last=drop_last)

    one = sampler()
    asked_in_any_order = {step: one.batch_indices(step).tolist() for step in steps}
    for step, rows in asked_in_any_order.items():
        assert sampler().batch_indices(step).tolist() == rows
        assert pickle.loads(pickle.dumps(one)).batch_indices(step).tolist() == rows
    if drop_last:
        assert all(one.step_at(step * size) == step for step in steps)


@given(
    num=st.integers(1, 60),
    size=st.integers(1, 20),
    seed=SEEDS,
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    epoch=st.integers(0, 5),
)
def test_batches_of_an_epoch_are_disjoint_and_leave_out_the_remainder_alone(
    num, size, seed, shuffle, drop_last, epoch
):
    if drop_last and num < size:
        return
    sampler = GlobalBatchSampler(num, size, seed=seed, shuffle=shuffle, drop_last=drop_last)
    first = epoch * sampler.steps_per_epoch
    batches = [sampler.batch_indices(step).tolist() for step in range(first, first + sampler.steps_per_epoch)]
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == len(rows) == num - sampler.dropped_per_epoch
    assert set(rows) <= set(range(num))
    assert all(len(batch) == size for batch in batches[:-1])
    assert len(batches[-1]) == (size if drop_last or num % size == 0 else num % size)
    assert {sampler.epoch_of(step) for step in range(first, first + sampler.steps_per_epoch)} == {epoch}
    if not shuffle:
        assert rows == list(range(len(rows)))
