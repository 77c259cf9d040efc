"""Which samples of a global batch share a micro-batch, and which rank gets it. Knows lengths, and builds nothing.

Both plans are pure functions of the lengths, so every rank finds the same one by itself. The objective is a sum over
the global batch: how it is cut changes time and memory, never the result.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray: TypeAlias = NDArray[np.int64]
Plan: TypeAlias = list[list[IntArray]]
"""By data-parallel rank, by micro-batch: positions in the global batch, ascending. The longest micro-batch comes
first, so that a rank that runs out of memory does so at once."""
_TURN_TOKENS = 256
"""An estimate: with so few tokens a GPU waits for its kernels' launches about as long as it computes."""


def by_length(lengths: IntArray, dp_size: int, size: int) -> Plan:
    """Micro-batches of ``size`` samples of similar length, to be padded to their longest.

    Sorted by length, the longest first, cut into micro-batches, and dealt out to the ranks there and back, so that
    they get equal numbers of micro-batches, similar in length. Where the samples are too few for that, micro-batches
    are smaller, and a rank may get none.

    Args:
        lengths: [N, 2] tokens of each sample's row and of its KL row.
        dp_size: number of ranks.
        size: samples per micro-batch.
    """
    order = np.argsort(-lengths.max(axis=1), kind="stable")
    size = max(1, min(size, -(-len(order) // dp_size)))
    return _deal([order[start : start + size] for start in range(0, len(order), size)], dp_size)


def packed(lengths: IntArray, dp_size: int, capacity: int, at_least: int) -> Plan:
    """As few micro-batches of at most ``capacity`` tokens as the samples fit into, equally full.

    Longest processing time first (Graham 1969) over a number of bins that grows until all of them hold: the longest
    sample that is left goes where the load will be smallest. The load is that of the row of samples or that of the KL
    rows, whichever is larger, as both are packed by this plan.

    Args:
        lengths: [N, 2] tokens of each sample's row and of its KL row, none above ``capacity``.
        dp_size: number of ranks; they get equal numbers of micro-batches, unless samples are too few.
        capacity: tokens of a micro-batch.
        at_least: micro-batches per rank, however short, as long as there are samples: what keeps a pipeline busy.
    """
    count = len(lengths)
    fewest = -(-int(lengths.sum(axis=0).max(initial=0)) // capacity)
    per_rank = max(-(-fewest // dp_size), at_least, 1)
    while True:
        bins = min(per_rank * dp_size, count)
        places, loads = _fill(lengths, bins)
        if bins == count or loads.max(initial=0) <= capacity:
            fullest_first = np.argsort(-loads, kind="stable")
            return _deal([np.flatnonzero(places == place) for place in fullest_first], dp_size)
        per_rank += 1


def micro_batches_of_pipeline(tokens: int, stages: int) -> int:
    """How many micro-batches of a rank's share take a pipeline the least time.

    M micro-batches of T tokens in all keep P stages for M + P - 1 turns, each as long as T / M + c tokens take, where
    c is what a turn costs by itself. The product is least at M = sqrt((P - 1) T / c).

    Args:
        tokens: T, of the rank's share.
        stages: P.
    """
    return 1 if stages == 1 else max(stages, math.isqrt((stages - 1) * tokens // _TURN_TOKENS))


def _fill(lengths: IntArray, bins: int) -> tuple[IntArray, IntArray]:
    """[N] the bin of each sample; [bins] the larger of its two loads."""
    places = np.zeros(len(lengths), dtype=np.int64)
    loads = np.zeros((bins, 2), dtype=np.int64)
    for sample in np.argsort(-lengths.max(axis=1), kind="stable"):
        place = int((loads + lengths[sample]).max(axis=1).argmin())
        places[sample] = place
        loads[place] += lengths[sample]
    return places, loads.max(axis=1)


def _deal(micro_batches: list[IntArray], dp_size: int) -> Plan:
    """There and back: 0, 1, 2, 2, 1, 0, 0, ..."""
    plan: Plan = [[] for _ in range(dp_size)]
    for number, positions in enumerate(micro_batches):
        turn, place = divmod(number, dp_size)
        plan[place if turn % 2 == 0 else dp_size - 1 - place].append(np.sort(positions))
    return plan
