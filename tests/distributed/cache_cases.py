"""What the ranks of test_cache.py do: the swap with and without a cache, and one cache under many layouts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import training_kit as kit
from training_kit import Setup

SETUPS = {
    "dp2": Setup(),
    "tp2": Setup(tp=2),
    "pp2": Setup(pp=2),
    "dp2 overlap bf16": Setup(optimizer="distributed_fused_adam", bf16=True, overlap=True),
}
STEPS = (0, 1)


class Counted:
    """A reference that counts how often it is entered, and with how many rows."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.rows = inner, []

    def log_probs(self, rows):
        self.rows.append(sum(entry.count for entry in rows))
        return self.inner.log_probs(rows)


class Cached:
    """A run's reference behind a cache in a folder that many runs may share."""

    def __init__(self, run: kit.Run, folder: Path) -> None:
        from nemo_kto.data.batch import ForwardSize
        from nemo_kto.reference.cache import CachedReference
        from nemo_kto.reference.columns import ReferenceColumns
        from nemo_kto.reference.log_prob_store import LogProbStore
        from nemo_kto.reference.swap import SwapReference

        self.scorer = Counted(SwapReference(run.swap, run.passes))
        store = LogProbStore(folder, b"x" * 32) if run.groups.is_speaker else None
        self.reference = CachedReference(store, self.scorer, run.groups, ForwardSize(kit.MICRO_BATCH))
        self.columns = ReferenceColumns(self.reference, size=None, needs_kl=True)


def _run(root: Path, setup: Setup) -> kit.Run:
    return kit.Run(setup, root / "tied-policy", root / "tied-reference")


def _columns(columns, run: kit.Run, steps=STEPS) -> list[torch.Tensor]:
    """Every reference column of this rank's shares; nothing off the last stage."""
    scored = [batch for step in steps for batch in columns.score(kit.batch(step, run.groups))]
    return [t for b in scored for t in (b.ref_logps, b.ref_kl_logps) if t is not None]


def _cold_and_warm(root: Path, name: str) -> dict[str, Any]:
    """An empty cache, the same again from memory, and a new process' view of it from disk, against the swap."""
    run = _run(root, SETUPS[name])
    run.train(1)
    expected = _columns(run.reference, run)
    cold = Cached(run, root / f"own {name}")
    first, second = _columns(cold.columns, run), _columns(cold.columns, run)
    torch.distributed.barrier()  # the other replica's file is there
    warm = Cached(run, root / f"own {name}")
    third = _columns(warm.columns, run)
    return {
        "bit-equal": kit.same(first, expected) and kit.same(second, expected) and kit.same(third, expected),
        "columns": len(expected),
        "asked": cold.reference.rows_asked,
        "computed": (cold.reference.rows_computed, warm.reference.rows_computed),
        "entered": (len(cold.scorer.rows), len(warm.scorer.rows)),
    }


def _foreign(root: Path, name: str) -> dict[str, Any]:
    """Entries that two data-parallel ranks have made, under another layout."""
    maker = _run(root, SETUPS["dp2"])
    made = Cached(maker, root / "shared")
    _columns(made.columns, maker)
    torch.distributed.barrier()
    run = _run(root, SETUPS[name])
    cached = Cached(run, root / "shared")
    found, expected = _columns(cached.columns, run), _columns(run.reference, run)
    return {
        "computed": cached.reference.rows_computed,
        "entered": len(cached.scorer.rows),
        "off by": max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)) if found else 0.0,
    }


def _one_rank_misses(rank: int, root: Path) -> dict[str, Any]:
    """The first rank's share is known and the second's is not: both enter, and one scores."""
    run = _run(root, SETUPS["dp2"])
    cached = Cached(run, root / f"private {rank}")  # nothing is shared here
    if rank == 0:
        entries = [b.samples for b in kit.batch(0, run.groups)]
        keys, logps = cached.reference._keys(entries), torch.cat(run.passes.log_probs(entries)).tolist()
        cached.reference.store.put(list(zip(keys, logps, strict=True)))
    rows = [b.samples for b in kit.batch(0, run.groups)]
    with_none = [] if rank == 0 else rows
    cached.reference.log_probs(rows)
    cached.reference.log_probs(with_none)  # known everywhere
    cached.reference.log_probs([] if rank == 0 else [b.kl_rows for b in kit.batch(0, run.groups)])
    return {"scored": cached.scorer.rows, "computed": cached.reference.rows_computed}


def _partly_known(rank: int, root: Path) -> dict[str, Any]:
    """One row of the first group is known; a row without labels and a row that comes twice are among the others."""
    from nemo_kto.data.batch import IGNORE, Rows

    run = _run(root, SETUPS["tp2"])
    cached = Cached(run, root / "partly")
    first, second, *_ = (b.samples for b in kit.batch(5, run.groups))
    cached.reference.log_probs([Rows(first.tokens[:1], first.labels[:1])])
    silent = Rows(second.tokens, torch.where(torch.tensor([[True], [False]]), second.labels, IGNORE))
    twice = Rows(first.tokens[[1, 1]], first.labels[[1, 1]])
    entries = [first, silent, twice]
    found = torch.cat(cached.reference.log_probs(entries))
    again = torch.cat(cached.reference.log_probs(entries))
    expected = torch.cat(run.reference._reference.log_probs(entries))
    return {
        "off by": (found - expected).abs().max().item(),
        "silent": found[3].item(),
        "twice": bool(found[1] == found[4] == found[5]),
        "again": torch.equal(found, again),
        "rows": cached.scorer.rows,
        "computed": cached.reference.rows_computed,
    }


def _trains_alike(root: Path, setup: Setup, folder: str) -> dict[str, Any]:
    """Six steps with the swap, with an empty cache, and with the cache that this filled."""
    plain = _run(root, setup)
    expected = plain.train(6)
    found = {}
    for name in ("cold", "warm"):
        run = _run(root, setup)
        cached = Cached(run, root / folder)
        object.__setattr__(run.step, "reference", cached.columns)
        found[name] = run.train(6) == expected and kit.same(run.weights(), plain.weights())
        found[f"{name} entered"] = len(cached.scorer.rows)
        found[f"{name} moved"] = run.swap.bytes_moved
        torch.distributed.barrier()
    return found


def _late(root: Path, setup: Setup) -> dict[str, Any]:
    """Reference weights that are read when they are needed, in the middle of a training."""
    from nemo_kto.checkpoint.weights import load_weights
    from nemo_kto.gpt.live import parameters_settled
    from nemo_kto.reference.late_capture import capture_from
    from nemo_kto.reference.swap import WeightSwap

    run = _run(root, setup)
    expected, digest = _columns(run.reference, run), run.swap.reference.digest()
    run.train(3)
    reads = []

    def load() -> None:
        reads.append(1)
        load_weights(run.chunks, run.arch, root / "tied-reference", run.groups)

    swap = WeightSwap(run.chunks, partial(capture_from, run.chunks, load))
    run.swap = swap
    cached = Cached(run, root / f"late {setup.tp} {setup.bf16}")
    with parameters_settled(run.chunks):  # else they are old ones, of which some have yet to be gathered
        before, state = run.weights(), run.optimizer_state()
    found = {"nothing read": not reads, "scores": kit.same(_columns(cached.columns, run), expected)}
    found |= {
        "read once": len(reads) == 1 and swap.reference.digest() == digest,
        "policy": kit.same(run.weights(), before) and kit.same(run.optimizer_state(), state),
    }

    def fail() -> None:
        load()
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        capture_from(run.chunks, fail)
    found["policy after an error"] = kit.same(run.weights(), before)
    after = run.train(2)
    plain = _run(root, setup)
    found["training"] = plain.train(5)[3:] == after
    return found


def two_ranks(rank: int, root: Path) -> dict[str, object]:
    own = {f"own {name}": (lambda _, r, name=name: _cold_and_warm(r, name)) for name in SETUPS}
    foreign = {f"foreign {name}": (lambda _, r, name=name: _foreign(r, name)) for name in ("tp2", "pp2")}
    overlap = SETUPS["dp2 overlap bf16"]
    return kit.each(
        {
            **own,
            **foreign,
            "one misses": _one_rank_misses,
            "partly": _partly_known,
            "trains": lambda _, r: _trains_alike(r, SETUPS["dp2"], "trained"),
            "trains overlap": lambda _, r: _trains_alike(r, overlap, "trained overlap"),
            "late": lambda _, r: _late(r, overlap),
            "late tp2": lambda _, r: _late(r, SETUPS["tp2"]),
        },
        rank,
        root,
    )
