"""The reference point over ranks, and the packed exchanges that carry it and everything else between ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from nemo_kto.distributed.collectives import broadcast_floats, raise_together, reduce_sums
from nemo_kto.errors import ConfigError, DataError, KTOError
from nemo_kto.objective.counts import BatchCounts
from nemo_kto.objective.losses import LossSettings, kl_partial_sum, reference_point

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
SETTINGS = LossSettings(
    beta=0.1,
    desirable_weight=1.0,
    undesirable_weight=1.0,
    kl_clamp="batch_mean",
    loss_normalization="per_class",
    loss_type="kto",
    preference_weight=1.0,
    sft_weight=0.0,
    average_log_probs=False,
    sft_average_log_probs=False,
)


@dataclass
class Seen:
    """What one rank saw, for the parent to check."""

    batch_mean: float
    per_sample: float
    sums: dict[str, float]
    received: dict[str, float]
    in_pair: dict[str, float]
    all_reduces: int


def _kl_ref(k: float, has_partner: bool, settings: LossSettings, pairs: int) -> float:
    partial = kl_partial_sum(torch.tensor([k], dtype=torch.float64), torch.tensor([has_partner]), settings)
    total = reduce_sums({"kl": partial}, dist.group.WORLD, CPU)["kl"]
    counts = BatchCounts(dist.get_world_size(), 1, 1, pairs, 0)
    return reference_point(torch.tensor(total, dtype=torch.float64), counts, settings).item()


def _exchange(rank: int) -> Seen:
    # Ranks 0 and 1 stand at -1 and +1; rank 2 has no partner, and its number must not count.
    k, has_partner = [-1.0, 1.0, 77.0][rank], rank < 2
    batch_mean = _kl_ref(k, has_partner, SETTINGS, pairs=2)
    per_sample = _kl_ref(k, has_partner, replace(SETTINGS, kl_clamp="per_sample"), pairs=2)

    calls: list[int] = []
    original = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        calls.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    needs_grad = torch.tensor([0.5], requires_grad=True)
    unordered = {"b": 2.0**53 if rank == 0 else 1.0, "a": needs_grad, "c": rank}
    if rank == 1:
        unordered = dict(reversed(unordered.items()))
    sums = reduce_sums(unordered, dist.group.WORLD, CPU)
    dist.all_reduce = original

    values = {"x": 1 / 3, "y": math.inf} if rank == 2 else None
    received = broadcast_floats(values, ["y", "x"], 2, dist.group.WORLD, CPU)
    pair, _ = dist.new_group([1, 2]), dist.new_group([0])
    in_pair = {}
    if rank > 0:
        in_pair = reduce_sums({"rank": rank}, pair, CPU)
        in_pair |= broadcast_floats({"from": float(rank)}, ["from"], 1, pair, CPU)
    return Seen(batch_mean, per_sample, sums, received, in_pair, len(calls))


def test_exchanges():
    for rank, seen in enumerate(run_ranks(3, _exchange)):
        # Clamped on each rank it would be 0.05 under batch_mean as well.
        assert seen.batch_mean == 0.0
        assert seen.per_sample == 0.1 * 1.0 / 2
        # 2^53 + 1 + 1 is a float64, which a float32 on the way would not carry.
        assert seen.sums == {"a": 1.5, "b": 2.0**53 + 2, "c": 3.0}
        assert seen.all_reduces == 1
        assert seen.received == {"x": 1 / 3, "y": math.inf}
        assert seen.in_pair == ({} if rank == 0 else {"rank": 3.0, "from": 1.0})


def _fail(error: Exception | None, group: dist.ProcessGroup) -> tuple[str, str] | None:
    try:
        raise_together(error, group)
    except Exception as raised:  # the type is what the test looks at
        return type(raised).__name__, str(raised)
    return None


def _failures(rank: int) -> list[tuple[str, str] | None]:
    world = dist.group.WORLD
    pair, _ = dist.new_group([1, 2]), dist.new_group([0])
    return [
        _fail(None, world),
        _fail(DataError("train.jsonl:7: no response") if rank == 2 else None, world),
        _fail([None, ConfigError("a"), DataError("b")][rank], world),
        _fail(ValueError("boom") if rank == 0 else None, world),
        _fail(DataError("in the pair") if rank == 2 else None, pair) if rank > 0 else None,
    ]


def test_raise_together():
    first, second, third = run_ranks(3, _failures)
    quiet, data, two, bug, pair = zip(first, second, third, strict=True)
    assert quiet == (None, None, None)
    told = ("DataError", "rank 2: train.jsonl:7: no response")
    assert data == (told, told, ("DataError", "train.jsonl:7: no response"))
    assert two == (("ConfigError", "rank 1: a"), ("ConfigError", "a"), ("DataError", "b"))
    heard = ("KTOError", "rank 0: ValueError: boom")
    assert bug == (("ValueError", "boom"), heard, heard)
    assert pair == (None, ("DataError", "rank 2: in the pair"), ("DataError", "in the pair"))
    assert (DataError.exit_code, KTOError.exit_code) == (3, 1)


def _alone(rank: int) -> tuple[dict[str, float], dict[str, float], tuple[str, str] | None]:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a collective in a group of one")

    dist.all_reduce = dist.broadcast = dist.all_gather_object = refuse
    world = dist.group.WORLD
    sums = reduce_sums({"b": 1, "a": torch.tensor(2.0)}, world, CPU)
    return sums, broadcast_floats({"x": 3.0}, ["x"], 0, world, CPU), _fail(DataError("mine"), world)


def test_a_group_of_one_communicates_nothing():
    assert run_ranks(1, _alone) == [({"a": 2.0, "b": 1.0}, {"x": 3.0}, ("DataError", "mine"))]
