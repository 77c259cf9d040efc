"""What the ranks of test_keeping.py do: where the policy waits during a swap, and the bytes that cross."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_kit as kit
from training_kit import Setup

SHARDED = "distributed_fused_adam"


def _run(root: Path, setup: Setup) -> kit.Run:
    return kit.Run(setup, root / "policy", root / "reference")


def _counting(rank: int, root: Path) -> dict[str, object]:
    """Sixteen real steps with 8 batches to a swap, and two with one each: bytes over P, and whether they are equal."""
    found = {}
    for way in ("host", "device", "masters"):
        run, plain = (_run(root, Setup(bf16=True, restore=way, lookahead=ahead)) for ahead in (8, 1))
        size = sum(p.numel() * p.element_size() for chunk in run.chunks for p in chunk.parameters())
        ahead, one_by_one = run.train(16), plain.train(2)
        found[way] = {
            "one copy": run.swap.reference.num_bytes / size,
            "by step": [moved / size for moved in run.reference_bytes],
            "without": [moved / size for moved in plain.reference_bytes],
            "total": run.swap.bytes_moved / size,
            "equal": ahead[:2] == one_by_one,
        }
    return found


def _copies(rank: int, root: Path) -> dict[str, dict[str, object]]:
    """How many copies one way takes, and whether they cover everything."""
    found = {}
    for name, optimizer in {"sharded": SHARDED, "plain": "adamw"}.items():
        weights = _run(root, Setup(bf16=True, optimizer=optimizer)).swap.reference
        runs = list(weights._runs())
        found[name] = {
            "copies": len(runs),
            "tensors": len(weights._in_order),
            "buffers": len(weights._buffers),
            "complete": sum(live.numel() for live, _ in runs) == sum(p.numel() for p in weights._in_order),
        }
    return found


def _refused(run: kit.Run) -> str:
    """Why the policy cannot be kept; it is there all the same, and the reference is not."""
    from nemo_kto.errors import KTOError

    policy = run.weights()
    with pytest.raises(KTOError) as refused, run.swap.swapped():
        raise AssertionError("swapped")
    assert kit.same(run.weights(), policy)
    assert not run.swap.active
    return str(refused.value)


def _kept(root: Path, setup: Setup, *, room: bool = True, spoil: bool = False) -> list[object]:
    """Where the policy waits, whether it comes back, and the copies that cross; or why it is refused.

    Args:
        root: of the models.
        setup: the run, which trains a step first.
        room: whether the device has room for a second copy.
        spoil: change the last bit of a live weight, which its master then does not round to.
    """
    from nemo_kto.reference import keeping

    run = _run(root, setup)
    run.train(1)
    if spoil:
        next(run.chunks[0].parameters()).detach().view(torch.int16).flatten()[-1:].bitwise_xor_(1)
    policy, before, real = run.weights(), run.swap.bytes_moved, keeping.free_bytes
    keeping.free_bytes = real if room else lambda _: (10, 100)
    run.swap._keepers[0]._copies = []  # of the first step's swap
    try:
        if setup.restore != "auto":
            return [_refused(run)]
        with run.swap.swapped():
            pass
    finally:
        keeping.free_bytes = real
    return [
        run.swap._latest,
        kit.same(run.weights(), policy),
        (run.swap.bytes_moved - before) / run.swap.reference.num_bytes,
    ]


def _fallbacks(rank: int, root: Path) -> dict[str, list[object]]:
    masters, bf16 = Setup(restore="masters"), Setup(bf16=True)
    return {
        "bf16": _kept(root, bf16, room=False),
        "bf16 sharded": _kept(root, replace(bf16, optimizer=SHARDED), room=False),
        "bf16 spoilt": _kept(root, bf16, room=False, spoil=True),
        "bf16 spoilt, with room": _kept(root, bf16, spoil=True),
        "fp32": _kept(root, Setup(), room=False),
        "fp32 sharded": _kept(root, Setup(optimizer=SHARDED), room=False),
        "told masters, fp32": [_refused(_run(root, masters))],
        "told masters, spoilt": _kept(root, replace(masters, bf16=True), spoil=True),
        "told device": _kept(root, Setup(restore="device"), room=False),
    }


def _shards(rank: int, root: Path) -> dict[str, list[object]]:
    """Masters of a shard do not make a policy; nobody waits for anybody."""
    setup = Setup(bf16=True, optimizer=SHARDED)
    return {
        "auto": _kept(root, setup, room=False),
        "told masters": [_refused(_run(root, replace(setup, restore="masters")))],
    }


def _on_cpu(rank: int, root: Path) -> dict[str, bool]:
    """Without CUDA nothing is pinned and no stream is made."""
    from nemo_kto.reference.host_weights import HostWeights

    weights = HostWeights([torch.nn.Linear(3, 3)])
    return {"stream": weights._stream is not None, "pinned": any(t.is_pinned() for t in weights._buffers.values())}


def one_rank(rank: int, root: Path) -> dict[str, object]:
    cases = {"counting": _counting, "copies": _copies, "fallbacks": _fallbacks, "on cpu": _on_cpu}
    return kit.each(cases, rank, root)


def two_ranks(rank: int, root: Path) -> dict[str, object]:
    return kit.each({"shards": _shards}, rank, root)
