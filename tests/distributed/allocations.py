"""What operators allocate and multiply. Knows nothing of Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from trajectory import Job

PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"}


@dataclass(frozen=True)
class Allocation:
    operator: str
    shape: tuple[int, ...]
    num_bytes: int
    """Of the whole storage."""


class Allocations(TorchDispatchMode):
    """While it is entered, records every storage that comes out of an operator and did not go in, in backward too.

    Work space inside a kernel is not seen. ``num_products`` counts matrix products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Allocation] = []
        self.num_products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.num_products += name in PRODUCTS
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and _storage(leaf) not in known:
                self.found.append(Allocation(name, tuple(leaf.shape), leaf.untyped_storage().nbytes()))
        return out

    def at_least(self, num_bytes: int) -> list[int]:
        """Bytes of the large allocations, in ascending order."""
        return sorted(a.num_bytes for a in self.found if a.num_bytes >= num_bytes)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class HeadWatch:
    """What the first policy pass of a job, all its micro-batches forward and backward, allocates.

    Args:
        job: in float32, about to train.
        columns: of the vocabulary, on this rank.
    """

    def __init__(self, job: Job, columns: int) -> None:
        self.columns = columns
        self.seen: dict[str, Any] = {}
        """``micro_batches``: their number; ``logits``: elements that the logits of every position of the largest one
        would have; ``largest``: elements of the largest tensor; ``rows``: of each tensor that has this rank's
        ``columns``."""
        self._passes, self._train = job.step.passes, job.step.passes.train
        self._passes.train = self._watched

    def _watched(self, batches: Any, *args: Any) -> Any:
        self._passes.train = self._train
        with Allocations() as allocations:
            totals = self._train(batches, *args)
        self.seen["micro_batches"] = len(batches)
        self.seen["logits"] = self.columns * max(batch.samples.tokens.numel() for batch in batches)
        self.seen["largest"] = max(a.num_bytes for a in allocations.found) // 4
        self.seen["rows"] = [a.shape[0] for a in allocations.found if a.shape[-1:] == (self.columns,)]
        return totals
