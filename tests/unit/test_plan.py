"""Which samples share a micro-batch: nothing lost, nothing too long, nobody waits."""

from __future__ import annotations

import fuzz_kit  # noqa: F401 - how to search
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_kto.data.plan import Plan, by_length, micro_batches_of_pipeline, packed

LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=40).map(
    lambda rows: np.array(rows, dtype=np.int64).reshape(-1, 2)
)


def flat(plan: Plan) -> list[int]:
    return sorted(int(place) for share in plan for places in share for place in places)


def loads(plan: Plan, lengths: np.ndarray) -> list[list[int]]:
    """By rank and micro-batch, the longer of the two packed rows."""
    return [[int(lengths[places].sum(axis=0).max()) for places in share] for share in plan]


@given(lengths=LENGTHS, dp_size=st.integers(1, 5), capacity=st.integers(30, 120), at_least=st.integers(1, 4))
def test_packed(lengths, dp_size, capacity, at_least):
    plan = packed(lengths, dp_size, capacity, at_least)
    assert len(plan) == dp_size
    assert flat(plan) == list(range(len(lengths)))
    full = loads(plan, lengths)
    assert all(load <= capacity for share in full for load in share)
    assert all(share == sorted(share, reverse=True) for share in full), "the longest first"
    numbers = [len(share) for share in plan]
    assert max(numbers) - min(numbers) <= 1
    assert sum(numbers) >= min(at_least * dp_size, len(lengths))
    assert all((np.diff(places) > 0).all() for share in plan for places in share), "in the batch's order"


@given(lengths=LENGTHS, dp_size=st.integers(1, 5), size=st.integers(1, 6))
def test_by_length(lengths, dp_size, size):
    plan = by_length(lengths, dp_size, size)
    assert flat(plan) == list(range(len(lengths)))
    assert all(1 <= len(places) <= size for share in plan for places in share)
    numbers = [len(share) for share in plan]
    assert max(numbers) - min(numbers) <= 1
    if len(lengths) % (dp_size * size) == 0:
        assert all(len(places) == size for share in plan for places in share)
    longest = sorted((int(lengths[places].max()) for share in plan for places in share), reverse=True)
    ordered = sorted(lengths.max(axis=1).tolist(), reverse=True)
    fits = max(1, min(size, -(-len(lengths) // dp_size)))
    assert longest == ordered[::fits], "neighbours in length share a micro-batch"


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_ranks_are_equally_full(dp_size):
    """Lengths as chat data have them: long tails. A rank's micro-batches hold tokens within 2 % of any other's."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5, 0.8, size=(512, 2)), 1, 2048).astype(np.int64)
    plan = packed(lengths, dp_size, 8192, 1)
    totals = [sum(int(lengths[places].sum()) for places in share) for share in plan]
    assert max(totals) <= 1.02 * min(totals)
    fewest = -(-int(lengths.sum(axis=0).max()) // (8192 * dp_size))
    assert {len(share) for share in plan} <= {fewest, fewest + 1}


@pytest.mark.parametrize(("tokens", "stages"), [(1000, 2), (32_000, 4), (500_000, 8)])
def test_pipelines_are_kept_busy(tokens, stages):
    """No other number of micro-batches takes less time by the formula, unless it leaves stages without work."""
    chosen = micro_batches_of_pipeline(tokens, stages)
    time = {m: (m + stages - 1) * (tokens / m + 256) for m in range(stages, 2000)}
    assert time[chosen] <= 1.001 * min(time.values())
    assert micro_batches_of_pipeline(tokens, 1) == 1
