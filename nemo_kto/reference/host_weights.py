"""A copy of a rank's weights in host memory. Knows nothing of policies or of when to copy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class HostWeights:
    """Every parameter of this rank's model slice that is trained, in host memory, pinned where CUDA is present.

    Copies go into existing storage, in place, both ways: Megatron's buffers hold views of the parameters, and
    rebinding ``.data`` would cut them off. On CUDA they run on a stream of their own, which waits for and is waited
    for by the current one.

    Args:
        chunks: model chunks whose parameters are copied now.
    """

    def __init__(self, chunks: Iterable[nn.Module]) -> None:
        self._parameters = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
        on_cuda = bool(self._parameters) and self._parameters[0].is_cuda
        self._stream = torch.cuda.Stream() if on_cuda else None
        self._host = [torch.empty_like(p, device="cpu", pin_memory=on_cuda) for p in self._parameters]
        self.num_bytes = sum(t.numel() * t.element_size() for t in self._host)
        """Bytes of one copy, one way."""
        self.capture()

    @torch.no_grad()
    def capture(self) -> None:
        """Live parameters -> host."""
        self._copy(zip(self._host, self._parameters, strict=True))

    @torch.no_grad()
    def restore(self) -> None:
        """Host -> live parameters, bit for bit."""
        self._copy(zip(self._parameters, self._host, strict=True))

    def digest(self) -> str:
        """SHA-256 over the host copy's bytes, in parameter order."""
        sha = hashlib.sha256()
        for tensor in self._host:
            sha.update(tensor.contiguous().view(torch.uint8).numpy())
        return sha.hexdigest()

    def _copy(self, pairs: Iterator[tuple[Tensor, Tensor]]) -> None:
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
