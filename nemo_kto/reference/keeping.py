"""Where the policy's weights wait while the reference's are in their place. Does not decide when.

Nothing here communicates: a rank whose scoring has failed puts its policy back alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

import psutil
import torch
from torch import Tensor, nn

from nemo_kto.reference.host_weights import HostWeights, trained_parameters

Masters: TypeAlias = Callable[[], Iterable[tuple[nn.Parameter, Tensor]]]
"""Gives (parameter, the float32 values that an optimizer keeps of it, or of a part of it)."""
RESERVE = 0.1
"""Part of all memory that a spare copy leaves free: for what scoring needs, and for what other processes may take."""


class Keeper(Protocol):
    """One way of keeping the policy, on one rank.

    Attributes:
        name: in ``model.kto.reference_restore``.
        bytes_moved: between host and device, for keeping and putting back once.
    """

    name: str
    bytes_moved: int

    def keep(self) -> str | None:
        """Hold the live parameters' values, whatever becomes of them. Returns why not, where it cannot."""
        ...

    def put_back(self) -> None:
        """Give the live parameters the values they had, in place and bit for bit. Once for every :meth:`keep`."""
        ...


class OnDevice:
    """A second copy on the device, as long as it is needed. Where there is no CUDA, host memory is the device's.

    Args:
        chunks: model chunks.
        reserve: part of the device's memory that must stay free.
    """

    name = "device"
    bytes_moved = 0

    def __init__(self, chunks: Iterable[nn.Module], reserve: float) -> None:
        self._parameters = trained_parameters(chunks)
        self._size = sum(p.nbytes for p in self._parameters)
        self._reserve = reserve
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def keep(self) -> str | None:
        """See :class:`Keeper`."""
        if not self._copies:
            device = self._parameters[0].device if self._parameters else torch.device("cpu")
            free, total = free_bytes(device)
            if free < self._size + self._reserve * total:
                return f"{self._size} bytes of {free} would not leave {self._reserve:.0%} of the memory free"
            try:
                self._copies = [torch.empty_like(p) for p in self._parameters]
            except torch.cuda.OutOfMemoryError:
                return f"the device has no room for {self._size} bytes more"
        _copy(self._copies, self._parameters)
        return None

    @torch.no_grad()
    def put_back(self) -> None:
        """See :class:`Keeper`."""
        _copy(self._parameters, self._copies)
        if self._copies and self._copies[0].is_cuda:
            self._copies = []  # training needs the room for activations; a host's costs time to get again


class InMasters:
    """Nothing is copied: bf16 weights are what the optimizer's float32 masters round to, which is checked every time.

    Args:
        chunks: model chunks.
        masters: of the optimizer; None where there is none.
    """

    name = "masters"
    bytes_moved = 0

    def __init__(self, chunks: Iterable[nn.Module], masters: Masters | None) -> None:
        self._parameters = trained_parameters(chunks)
        self._source = masters
        self._masters: list[Tensor] = []

    @torch.no_grad()
    def keep(self) -> str | None:
        """See :class:`Keeper`."""
        if self._source is None:
            return "there is no optimizer"
        known = {
            parameter: master
            for parameter, master in self._source()
            if (parameter.dtype, master.dtype) == (torch.bfloat16, torch.float32) and parameter.device == master.device
        }
        if any(p not in known or known[p].numel() != p.numel() for p in self._parameters):
            return "this rank's optimizer does not hold float32 masters of all its weights"
        self._masters = [known[p].view(p.shape) for p in self._parameters]
        if _any_differs(self._parameters, self._masters):
            return "the optimizer's float32 masters round to other weights than the policy's"
        return None

    @torch.no_grad()
    def put_back(self) -> None:
        """See :class:`Keeper`."""
        _copy(self._parameters, self._masters)
        self._masters = []


class OnHost:
    """A copy in host memory: out and back. The memory is taken at the first use.

    Args:
        chunks: model chunks.
    """

    name = "host"

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self._chunks = chunks
        self._weights: HostWeights | None = None
        self.bytes_moved = 2 * sum(p.nbytes for p in trained_parameters(chunks))

    def keep(self) -> str | None:
        """See :class:`Keeper`."""
        if self._weights is None:
            self._weights = HostWeights(self._chunks)
        else:
            self._weights.capture()
        return None

    def put_back(self) -> None:
        """See :class:`Keeper`."""
        assert self._weights is not None
        self._weights.restore()


def keepers(way: str, chunks: Sequence[nn.Module], masters: Masters | None) -> list[Keeper]:
    """The ways to try, in this order.

    Args:
        way: ``model.kto.reference_restore``.
        chunks: model chunks.
        masters: of the optimizer; None where there is none.
    """
    ways: dict[str, list[Keeper]] = {
        "auto": [OnDevice(chunks, RESERVE), InMasters(chunks, masters), OnHost(chunks)],
        "device": [OnDevice(chunks, 0.0)],
        "masters": [InMasters(chunks, masters)],
        "host": [OnHost(chunks)],
    }
    return ways[way]


def free_bytes(device: torch.device) -> tuple[int, int]:
    """(Bytes that can be had on ``device``, all it has): what torch holds and does not use counts as free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """On the current stream, and so after what is queued there and before what comes next."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _any_differs(weights: Sequence[Tensor], masters: Sequence[Tensor]) -> bool:
    """Whether the bits of bf16 ``weights`` are not those of rounded float32 ``masters``. Waits for the device once."""
    differs = [
        (weight.detach().view(torch.int16) != master.to(weight.dtype).view(torch.int16)).any()
        for weight, master in zip(weights, masters, strict=True)
    ]
    return bool(differs) and bool(torch.stack(differs).any())
