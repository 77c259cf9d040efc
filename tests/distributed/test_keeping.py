"""Where the policy waits while the reference is swapped in, what crosses between host and device, what is refused."""

from __future__ import annotations

import pytest
import tiny
import training_kit as kit
from harness import run_ranks
from keeping_cases import one_rank, two_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("keeping")
    for number, name in enumerate(("policy", "reference")):
        tiny.make_model(root / name, seed=number, **kit.SIZES)
    return root


@pytest.fixture(scope="module")
def one(root):
    return run_ranks(1, one_rank, root, timeout=240)


@pytest.mark.parametrize(("way", "copies"), [("host", 3), ("device", 1), ("masters", 1)])
def test_bytes_are_counted(way, copies, one):
    """One copy of the parameters per swap, three by way of the host; 8 global batches to a swap leave an eighth."""
    found = kit.of(one, "counting")[0][way]
    assert found["one copy"] == 1
    assert found["without"] == [copies, copies]
    assert found["by step"] == [copies, *[0] * 7, copies, *[0] * 7]
    assert found["total"] / 16 == {3: 0.375, 1: 0.125}[copies]
    assert found["equal"], "looking ahead changes no bit"


def test_what_lies_side_by_side_is_one_copy(one):
    (found,) = kit.of(one, "copies")
    for name in ("sharded", "plain"):
        assert found[name]["complete"]
        assert found[name]["buffers"] == 1
    # Megatron's parameter buffer begins every parameter at a multiple of 64 elements, which all sizes here are
    assert found["sharded"]["copies"] == 1 < found["sharded"]["tensors"]


KEPT = {
    "bf16": ["masters", True, 1],
    "bf16 sharded": ["masters", True, 1],
    "bf16 spoilt": ["host", True, 3],
    "bf16 spoilt, with room": ["device", True, 1],
    "fp32": ["host", True, 3],
    "fp32 sharded": ["host", True, 3],
}


@pytest.mark.parametrize("name", KEPT)
def test_where_one_way_is_not_possible_the_next_is_taken(name, one):
    (found,) = kit.of(one, "fallbacks")
    assert found[name] == KEPT[name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("told masters, fp32", "masters: this rank's optimizer does not hold float32 masters of all its weights"),
        ("told masters, spoilt", "masters: the optimizer's float32 masters round to other weights than the policy's"),
        ("told device", "device: "),
    ],
)
def test_what_was_asked_for_and_cannot_be_is_refused(name, reason, one):
    (message,) = kit.of(one, "fallbacks")[0][name]
    way = name.split(",")[0].removeprefix("told ")
    assert message.startswith(f"model.kto.reference_restore={way}: {reason}")
    assert message.endswith("use auto or host")


def test_shards_of_masters_are_not_used(root):
    for found in kit.of(run_ranks(2, two_ranks, root, timeout=240), "shards"):
        assert found["auto"] == ["host", True, 3]
        assert "does not hold float32 masters of all its weights" in found["told masters"][0]


def test_nothing_is_pinned_without_cuda(one):
    assert kit.of(one, "on cpu") == [{"stream": False, "pinned": False}]
