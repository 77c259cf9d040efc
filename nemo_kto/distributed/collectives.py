"""Packed exchanges of a few numbers, and of errors, over explicit groups. Not for gradients or activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_kto.errors import KTOError


@torch.no_grad()
def reduce_sums(
    sums: Mapping[str, float | Tensor], group: dist.ProcessGroup, device: torch.device
) -> dict[str, float]:
    """Sum named numbers over ``group`` in one float64 all-reduce.

    Args:
        sums: numbers or one-element tensors by name. The names must be the same on all ranks, in any order.
        group: the ranks to sum over. A group of one communicates nothing.
        device: where the packed vector lives; a device the group's backend can reduce on.

    Returns:
        The totals by name, the same on all ranks.
    """
    keys = sorted(sums)
    packed = torch.zeros(len(keys), dtype=torch.float64, device=device)
    for slot, key in enumerate(keys):
        packed[slot] = sums[key]
    if group.size() > 1:
        dist.all_reduce(packed, group=group)
    return dict(zip(keys, packed.tolist(), strict=True))


def broadcast_floats(
    values: Mapping[str, float] | None, keys: Sequence[str], src: int, group: dist.ProcessGroup, device: torch.device
) -> dict[str, float]:
    """Give every rank of ``group`` the named numbers of one of them, in one float64 broadcast.

    Args:
        values: the numbers by name on ``src``; not looked at elsewhere.
        keys: the names, the same on all ranks.
        src: world rank of the source, a member of ``group``.
        group: the ranks that receive. A group of one communicates nothing.
        device: where the packed vector lives.

    Returns:
        The source's numbers by name.
    """
    packed = torch.zeros(len(keys), dtype=torch.float64, device=device)
    if dist.get_rank() == src:
        assert values is not None
        packed = torch.tensor([values[key] for key in keys], dtype=torch.float64, device=device)
    if group.size() > 1:
        dist.broadcast(packed, src=src, group=group)
    return dict(zip(keys, packed.tolist(), strict=True))


def raise_together(error: Exception | None, group: dist.ProcessGroup) -> None:
    """Let every rank of ``group`` know whether any of them failed, and end all of them if so.

    Without it the ranks that succeeded would wait in their next collective until it times out.

    Args:
        error: what went wrong on this rank, None if nothing did.
        group: the ranks that stand or fall together; all must call.

    Raises:
        Exception: ``error`` itself where there is one.
        KTOError: elsewhere, of the class (hence the exit code) of the first failing rank's error where that is a
            KTOError; the message names that rank and repeats its message.
    """
    report = None if error is None else _describe(error)
    reports: list[tuple[type[KTOError], str] | None] = [None] * group.size()
    if group.size() > 1:
        dist.all_gather_object(reports, report, group=group)
    if error is not None:
        raise error
    for member, found in enumerate(reports):
        if found is not None:
            error_class, message = found
            raise error_class(f"rank {dist.get_global_rank(group, member)}: {message}")


def _describe(error: Exception) -> tuple[type[KTOError], str]:
    """What other ranks raise. The error itself may not survive pickling."""
    if isinstance(error, KTOError):
        return type(error), str(error)
    return KTOError, f"{type(error).__name__}: {error}"
