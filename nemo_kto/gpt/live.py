"""Whose weights a model holds right now, and whether all of them have arrived. Copies and computes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module
from torch import nn

_REFERENCES: WeakSet[nn.Module] = WeakSet()


def mark_reference(chunks: Iterable[nn.Module], holds_reference: bool) -> None:
    """Note whether the live parameters are the reference policy's."""
    for chunk in chunks:
        (_REFERENCES.add if holds_reference else _REFERENCES.discard)(_bare(chunk))


def is_reference(chunks: Iterable[nn.Module]) -> bool:
    """Whether the live parameters are the reference policy's."""
    return any(_bare(chunk) in _REFERENCES for chunk in chunks)


def require_policy(chunks: Iterable[nn.Module], action: str) -> None:
    """Refuse ``action`` while the live parameters are the reference's.

    Raises:
        RuntimeError: the reference is swapped in.
    """
    if is_reference(chunks):
        raise RuntimeError(f"{action} while the reference weights are swapped in would act on the wrong policy")


def _bare(chunk: nn.Module) -> nn.Module:
    while isinstance(chunk, (DistributedDataParallel, Float16Module)):
        chunk = chunk.module
    return chunk


@contextmanager
def parameters_settled(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """Finish Megatron's overlapped parameter gathers, and keep their hooks off until the block ends.

    After an optimizer step with overlapped gathers a rank holds new values of its own shard only. Whatever reads or
    replaces parameters outside a forward pass (a swap, a checkpoint, an export) would take stale ones, and a gather
    still pending would overwrite what is put there.
    """
    hooked = [c for c in chunks if isinstance(c, DistributedDataParallel) and c.ddp_config.overlap_param_gather]
    for chunk in hooked:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in hooked:
            chunk.enable_forward_pre_hook()
