"""Mismatched partners that stay over all epochs. ``objective/pairing.py``'s rule, for millions of rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nemo_kto.data.sampler import IntArray
from nemo_kto.data.store import TokenStore

NONE = -1
"""Partner of a row that has none."""


def fixed_partners(store: TokenStore, order: IntArray) -> IntArray:
    """For each row the next one in a cyclic order of all rows whose prompt and response both differ from its own.

    Args:
        store: n rows.
        order: [n] int64, a permutation of the rows: that of the first epoch. It and the store decide everything.

    Returns:
        [n] int64, by row of the store: the partner's row; ``NONE`` where no row differs in both.
    """
    prompts, responses = (_ids(keys)[order] for keys in (store.prompt_keys, store.response_keys))
    places = _next_that_differs(prompts, responses)
    partners = np.full(len(order), NONE, dtype=np.int64)
    partners[order] = np.where(places == NONE, NONE, order[places])
    return partners


def _ids(keys: NDArray[np.uint64]) -> IntArray:
    """[n] small integers that are equal where the [n, 2] keys are."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    changes = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    ids = np.zeros(len(keys), dtype=np.int64)
    ids[order[1:]] = np.cumsum(changes)
    return ids


def _next_that_differs(prompts: IntArray, responses: IntArray) -> IntArray:
    """[n] int64 places. All rows look at once, and skip runs of equal neighbours in one step."""
    size = len(prompts)
    prompt_runs, response_runs = _distances_to_change(prompts), _distances_to_change(responses)
    found = np.full(size, NONE, dtype=np.int64)
    rows, distance = np.arange(size), np.ones(size, dtype=np.int64)
    while True:
        within = distance < size
        rows, distance = rows[within], distance[within]
        if not rows.size:
            return found
        places = (rows + distance) % size
        same_prompt, same_response = prompts[places] == prompts[rows], responses[places] == responses[rows]
        differs = ~(same_prompt | same_response)
        found[rows[differs]] = places[differs]
        distance = distance + np.where(same_prompt, prompt_runs[places], response_runs[places])
        rows, distance = rows[~differs], distance[~differs]


def _distances_to_change(ids: IntArray) -> IntArray:
    """[n] int64: for each place the cyclic distance to the next id that differs; n if none does."""
    size = len(ids)
    changes = np.flatnonzero(ids != np.roll(ids, -1))  # the last places of runs
    if not changes.size:
        return np.full(size, size, dtype=np.int64)
    places = np.arange(size, dtype=np.int64)
    following = np.searchsorted(changes, places)
    ends = np.where(following < changes.size, changes[following % changes.size], changes[0] + size)
    return ends - places + 1
