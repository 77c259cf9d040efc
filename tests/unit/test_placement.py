"""The line that a run starts with: which rank sits where, in full or by a rule, and always short."""

from __future__ import annotations

import pytest

from nemo_kto.config.placement import describe, seats, short, split_tensor_groups
from nemo_kto.config.world import World


def _block(nodes: int, each: int, pattern: str = "gpu{:03d}") -> list[str]:
    return [pattern.format(1 + rank // each) for rank in range(nodes * each)]


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        (["vm"], "rank 0 vm"),
        (["vm"] * 4, "ranks 0-3 vm"),
        (["a", "b"], "ranks 0 a, 1 b"),
        (_block(2, 8, "kton{}"), "ranks 0-7 kton1, 8-15 kton2"),
        (["a", "b", "a", "b"], "ranks 0 a, 1 b, 2 a, 3 b"),
        (["n1", "n2"] * 8, "ranks 0-15 in turn over n[1-2]"),
        (_block(5, 2), "ranks 0-9 in order, 2 on each of gpu[001-005]"),
        (_block(128, 8), "ranks 0-1023 in order, 8 on each of gpu[001-128]"),
        (
            ["n1", "n2", "n3", "n1", "n2", "n2"],
            "ranks 0 n1, 1 n2, 2 n3, 3 n1 and so on, in 5 runs over n[1-3]",
        ),
    ],
)
def test_seats(hosts, said):
    assert seats(hosts) == said


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["n1"], "n1"),
        (["n01", "n02", "n03", "n07"], "n[01-03,07]"),
        (["n9", "n10", "n11"], "n[9-11]"),
        (["n2", "n1"], "n[2,1]"),
        (["a1", "a2", "b1"], "a[1-2],b1"),
        (["login", "gpu3", "gpu4"], "login,gpu[3-4]"),
        (["n1.x", "n2.x"], "n1.x,n2.x"),
        ([f"host-{n * n}" for n in range(1, 65)], "64 hosts, host-1 to host-4096"),
    ],
)
def test_names_are_shortened_in_their_order(names, said):
    assert short(names) == said


def test_the_line():
    world = World(0, 16, 8, True, launcher="torchrun in Slurm job 7")
    assert describe(world, 8, 1, _block(2, 8, "kton{}"), "nccl over ib0") == (
        "world 16 = 2 nodes x 8 (torchrun in Slurm job 7), TP 8 x PP 1 x DP 2; ranks 0-7 kton1, 8-15 kton2; "
        "nccl over ib0"
    )


def test_the_line_of_a_thousand_ranks_is_no_longer():
    world = World(0, 1024, 8, True, launcher="srun in Slurm job 123456")
    line = describe(world, 8, 4, _block(128, 8), "nccl over ib0 (NCCL_SOCKET_IFNAME)")
    assert line.startswith("world 1024 = 128 nodes x 8 (srun in Slurm job 123456), TP 8 x PP 4 x DP 32; ")
    assert len(line) < 200
    odd = describe(world, 8, 4, [f"{rank * 7919 % 128:x}-{rank // 8}.site" for rank in range(1024)], "nccl")
    assert len(odd) < 400


@pytest.mark.parametrize(
    ("tp", "hosts", "number"),
    [(2, ["a", "a", "b", "b"], 0), (2, ["a", "b", "a", "b"], 2), (4, ["a", "a", "b", "b"], 1), (1, ["a", "b"], 0)],
)
def test_tensor_groups_across_hosts(tp, hosts, number):
    assert split_tensor_groups(tp, hosts) == number
