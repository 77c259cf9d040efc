"""128-bit keys to float64 numbers in memory, millions of them. Knows no files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_kto.reference.log_prob_file import Keys


@dataclass(frozen=True)
class _Run:
    """Entries in the order of the key's first half; 24 bytes each."""

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    values: NDArray[np.float64]

    def merged(self, later: _Run) -> _Run:
        """Both; where keys are equal, the entries of ``later`` come behind."""
        high = np.concatenate([self.high, later.high])
        order = np.argsort(high, kind="stable")
        low, values = np.concatenate([self.low, later.low]), np.concatenate([self.values, later.values])
        return _Run(high[order], low[order], values[order])

    def find(self, keys: Keys, wanted: NDArray[np.int64], out: NDArray[np.float64]) -> NDArray[np.int64]:
        """Write the numbers of ``keys[wanted]`` into ``out``; which of ``wanted`` are not here."""
        place = np.searchsorted(self.high, keys[wanted, 0], side="left")
        absent = []
        while wanted.size:
            # keys may share their first half, and then stand beside one another
            near = (place < self.high.size) & (self.high[np.minimum(place, self.high.size - 1)] == keys[wanted, 0])
            absent.append(wanted[~near])
            wanted, place = wanted[near], place[near]
            hit = self.low[place] == keys[wanted, 1]
            out[wanted[hit]] = self.values[place[hit]]
            wanted, place = wanted[~hit], place[~hit] + 1
        return np.concatenate([wanted, *absent])


class SortedRuns:
    """Entries that only ever become more. The first entry of a key stays: what was once told is told again.

    A run at least doubles with every merge, so n entries make about log n runs, each of them is moved about log n
    times, and a look-up is a binary search in each.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    def __len__(self) -> int:
        return sum(run.high.size for run in self._runs)

    def add(self, keys: Keys, values: NDArray[np.float64]) -> None:
        """Add entries.

        Args:
            keys: [n, 2] uint64.
            values: [n] float64.
        """
        if not len(keys):
            return
        order = np.argsort(keys[:, 0], kind="stable")
        run = _Run(keys[order, 0], keys[order, 1], values[order])
        while self._runs and self._runs[-1].high.size <= 2 * run.high.size:
            run = self._runs.pop().merged(run)
        self._runs.append(run)

    def get(self, keys: Keys) -> NDArray[np.float64]:
        """[n] float64: the numbers of [n, 2] keys, NaN where there is no entry."""
        out = np.full(len(keys), np.nan)
        wanted = np.arange(len(keys))
        for run in self._runs:
            wanted = run.find(keys, wanted, out)
        return out
