"""Inputs of the LM head for tests, and its result in float64 over the full vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_kto.distributed.logprobs import response_logprobs

HIDDEN, TOKENS = 16, 7
CHUNK_ROWS = (1, 3, TOKENS)
"""Rows per chunk: a chunk for each token, chunks of 3, 3 and 1, and one for all."""


@dataclass(frozen=True)
class Inputs:
    """The same on every rank."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    grad: Tensor
    vocab: int

    @classmethod
    def random(cls, vocab: int, padded: int, tokens: int, dtype: torch.dtype, columns: int = HIDDEN) -> Inputs:
        generator = torch.Generator().manual_seed(vocab + tokens)
        hidden = torch.randn(tokens, columns, generator=generator)
        weight = torch.randn(padded, columns, generator=generator)
        weight[vocab:] = 50.0  # padding that would win the maximum if it were looked at
        targets = torch.randint(0, vocab, (tokens,), generator=generator)
        if tokens > 1:
            targets[0], targets[1] = 0, vocab - 1
        return cls(hidden.to(dtype), weight.to(dtype), targets, torch.randn(tokens, generator=generator), vocab)

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs and the gradients of hidden and weight, in float64 from the numbers given."""
        hidden, weight = self.hidden.double().requires_grad_(), self.weight.double().requires_grad_()
        logits = (hidden @ weight.t())[:, : self.vocab]
        logps = torch.log_softmax(logits, dim=1).gather(1, self.targets[:, None]).squeeze(1)
        return logps.detach(), *torch.autograd.grad(logps, [hidden, weight], self.grad.double())

    def shard(self, group: dist.ProcessGroup) -> Tensor:
        return self.weight.chunk(group.size())[group.rank()].clone()

    def ours(self, group: dist.ProcessGroup, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`exact`, of this rank's rows of the weight."""
        hidden, shard = self.hidden.clone().requires_grad_(), self.shard(group).requires_grad_()
        logps = self.logps(hidden, shard, group, rows)
        return logps.detach(), *torch.autograd.grad(logps, [hidden, shard], self.grad.to(logps.dtype))

    def logps(self, hidden: Tensor, shard: Tensor, group: dist.ProcessGroup, rows: int) -> Tensor:
        budget = rows * shard.shape[0] * max(shard.element_size(), 4)
        return response_logprobs(hidden, shard, self.targets, group, vocab_size=self.vocab, chunk_bytes=budget)
