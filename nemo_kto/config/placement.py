"""One line that says what a job is: how many ranks, their layout, where each of them is, and how they talk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from nemo_kto.config.world import World

_SPELT_OUT = 4  # runs of ranks, or names, that are listed in full
_LONGEST = 100  # characters of a list of hosts


def describe(world: World, tp: int, pp: int, hosts: Sequence[str], channel: str) -> str:
    """The line that a run starts with.

    Args:
        world: any process of the job.
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        hosts: the host of each rank.
        channel: backend and interface, such as ``gloo over eth0``.

    Returns:
        For example ``world 16 = 2 nodes x 8 (torchrun), TP 8 x PP 1 x DP 2; ranks 0-7 n1, 8-15 n2; nccl over ib0``.
    """
    nodes = "1 node" if world.num_nodes == 1 else f"{world.num_nodes} nodes"
    layout = f"TP {tp} x PP {pp} x DP {world.size // (tp * pp)}"
    return f"world {world.size} = {nodes} x {world.local_size} ({world.launcher}), {layout}; {seats(hosts)}; {channel}"


def seats(hosts: Sequence[str]) -> str:
    """Which rank sits where: in full for few hosts, by a rule for many, as long as there is one."""
    runs = _runs(hosts)
    names = [host for host, _, _ in runs]
    if len(runs) <= _SPELT_OUT:
        word = "rank" if len(hosts) == 1 else "ranks"
        return f"{word} " + ", ".join(f"{_span(first, last)} {host}" for host, first, last in runs)
    sizes = {last - first + 1 for _, first, last in runs}
    if len(sizes) == 1 and len(set(names)) == len(names):
        return f"ranks 0-{len(hosts) - 1} in order, {sizes.pop()} on each of {short(names)}"
    period = len(set(hosts))
    if list(hosts) == [hosts[rank % period] for rank in range(len(hosts))]:
        return f"ranks 0-{len(hosts) - 1} in turn over {short(hosts[:period])}"
    few = ", ".join(f"{_span(first, last)} {host}" for host, first, last in runs[:_SPELT_OUT])
    return f"ranks {few} and so on, in {len(runs)} runs over {short(sorted(set(hosts)))}"


def short(names: Sequence[str]) -> str:
    """Host names as Slurm shortens them, ``n[01-03,07]``; the ends alone where that is long as well."""
    groups: list[tuple[str, list[str]]] = []
    for name in names:
        stem, digits = _parts(name)
        if groups and groups[-1][0] == stem and digits:
            groups[-1][1].append(digits)
        else:
            groups.append((stem, [digits] if digits else []))
    text = ",".join(stem + _bracketed(numbers) for stem, numbers in groups)
    return text if len(text) <= _LONGEST else f"{len(names)} hosts, {names[0]} to {names[-1]}"


def split_tensor_groups(tp: int, hosts: Sequence[str]) -> int:
    """How many tensor-parallel groups have ranks on several hosts. Ranks of a group follow one another."""
    return sum(len(set(hosts[first : first + tp])) > 1 for first in range(0, len(hosts), tp))


def _runs(hosts: Sequence[str]) -> list[tuple[str, int, int]]:
    """Host, first and last rank of each run of ranks on one host."""
    found = []
    for host, ranks in groupby(range(len(hosts)), key=hosts.__getitem__):
        members = list(ranks)
        found.append((host, members[0], members[-1]))
    return found


def _parts(name: str) -> tuple[str, str]:
    """``gpu01.cluster`` has no number that ends it: only names without a domain are shortened."""
    found = re.fullmatch(r"(.*?)(\d*)", name)
    assert found is not None
    return found[1], found[2]


def _bracketed(numbers: Sequence[str]) -> str:
    runs: list[list[str]] = []
    for number in numbers:
        if runs and int(number) == int(runs[-1][-1]) + 1 and len(number) >= len(runs[-1][-1]):
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    if not spans:
        return ""
    return spans[0] if len(numbers) == 1 else f"[{','.join(spans)}]"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
