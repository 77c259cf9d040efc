"""A copy of a rank's weights in host memory. Knows nothing of policies or of when to copy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def trained_parameters(chunks: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Every parameter of this rank's model slice that is trained, in order."""
    return [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]


class HostWeights:
    """Every parameter of this rank's model slice that is trained, in host memory: one buffer per dtype.

    The buffers are pinned where CUDA is present (torch then takes memory up to the next power of two). Their order is
    that of the parameters in device memory, and what lies side by side there, as in Megatron's parameter buffers, is
    one copy.

    Copies go into existing storage, in place, both ways: Megatron's buffers hold views of the parameters, and
    rebinding ``.data`` would cut them off. On CUDA they run on a stream of their own, which waits for and is waited
    for by the current one.

    Args:
        chunks: model chunks whose parameters are copied now.
    """

    def __init__(self, chunks: Iterable[nn.Module]) -> None:
        parameters = trained_parameters(chunks)
        on_cuda = bool(parameters) and parameters[0].is_cuda
        self._stream = torch.cuda.Stream() if on_cuda else None
        self._buffers = {
            dtype: torch.empty(sum(p.numel() for p in parameters if p.dtype == dtype), dtype=dtype, pin_memory=on_cuda)
            for dtype in dict.fromkeys(p.dtype for p in parameters)
        }
        self._places = _places(parameters)
        """Parameters in the buffers' order, each with its first element's place in its dtype's buffer."""
        self._in_order = parameters
        self.num_bytes = sum(buffer.nbytes for buffer in self._buffers.values())
        """Bytes of one copy, one way."""
        self.capture()

    @torch.no_grad()
    def capture(self) -> None:
        """Live parameters -> host."""
        self._copy((host, live) for live, host in self._runs())

    @torch.no_grad()
    def restore(self) -> None:
        """Host -> live parameters, bit for bit."""
        self._copy(self._runs())

    def digest(self) -> str:
        """SHA-256 over the host copy's bytes, in parameter order."""
        sha, places = hashlib.sha256(), dict(self._places)
        for parameter in self._in_order:
            start = places[parameter]
            kept = self._buffers[parameter.dtype][start : start + parameter.numel()]
            sha.update(kept.view(torch.uint8).numpy())
        return sha.hexdigest()

    def _runs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(live, host) pairs that cover everything, as few as there can be."""
        run: list[tuple[nn.Parameter, int]] = []
        for parameter, start in self._places:
            if run and not _follows(parameter, run[-1][0]):
                yield self._pair(run)
                run = []
            run.append((parameter, start))
        if run:
            yield self._pair(run)

    def _pair(self, run: list[tuple[nn.Parameter, int]]) -> tuple[Tensor, Tensor]:
        first, start = run[0]
        size = sum(parameter.numel() for parameter, _ in run)
        host, live = self._buffers[first.dtype][start : start + size], first.detach()
        return (live, host.view(live.shape)) if len(run) == 1 else (live.as_strided((size,), (1,)), host)

    def _copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        # the host may read or overwrite its side as soon as this returns
        self._stream.synchronize()
        torch.cuda.current_stream().wait_stream(self._stream)


def _places(parameters: list[nn.Parameter]) -> list[tuple[nn.Parameter, int]]:
    places, sizes = [], dict.fromkeys((p.dtype for p in parameters), 0)
    for parameter in sorted(parameters, key=lambda p: p.data_ptr()):
        places.append((parameter, sizes[parameter.dtype]))
        sizes[parameter.dtype] += parameter.numel()
    return places


def _follows(parameter: nn.Parameter, before: nn.Parameter) -> bool:
    """Whether one lies right behind the other in the same storage. Asked anew for every copy: storage can change."""
    return (
        parameter.dtype == before.dtype
        and parameter.is_contiguous()
        and before.is_contiguous()
        and parameter.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
        and parameter.data_ptr() == before.data_ptr() + before.nbytes
    )
