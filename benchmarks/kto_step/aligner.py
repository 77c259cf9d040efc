"""NeMo-Aligner's KTO step on our network: what it computes, with none of our savings. For comparison alone.

Read in its sources (after 0.7.0): per micro-batch of B samples one padded block of 2 B rows, the samples and their
mismatched pairs, goes through the training forward and the backward, although no gradient leaves the pairs; logits of
every position; and every step the policy's weights go to host memory, the reference's come in for a forward over the
2 B rows, and the policy's come back: three copies of the parameters. Its objective, with the whole global batch in one
micro-batch on one rank, is our preset ``kto_paper``, so losses must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn

from nemo_kto.data.batch import IGNORE, KTOBatch, StepBatch
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.gpt.network import unwrap
from nemo_kto.objective.counts import BatchCounts
from nemo_kto.objective.losses import (
    LossSettings,
    kl_partial_sum,
    kto_loss,
    log_ratios,
    reference_point,
    rewards,
)


class AlignerStep:
    """One step's passes; takes the place of :class:`nemo_kto.training.step.KTOStep` in training.

    Args:
        chunks: the model as it is trained, holding the reference's weights now.
        settings: the objective.
        groups: the layout: one rank.
    """

    def __init__(self, chunks: nn.ModuleList, settings: LossSettings, groups: ParallelGroups) -> None:
        assert groups.dp_size == groups.pp_size == groups.tp_size == 1
        self._chunks, self._settings, self._groups = list(chunks), settings, groups
        self._parameters = list(chunks.parameters())
        self._reference = [parameter.detach().clone() for parameter in self._parameters]
        self.bytes_moved = 0

    def use_masters(self, masters: Any) -> None:
        """Nothing: the policy always waits on the host."""

    def train(self, step: StepBatch) -> dict[str, float]:
        """Accumulate the gradient, and return the sums that the model's metrics are made of."""
        doubled = [(batch, *_doubled(batch)) for batch in step]
        with torch.no_grad(), self._swapped():
            reference = [out["logps"] for out in self._run(doubled, self._score, forward_only=True)]
        items = [(*item, logps) for item, logps in zip(doubled, reference, strict=True)]
        train = partial(self._train, counts=step.counts, scale=len(items))
        outputs = self._run(items, train, forward_only=False)
        return {name: sum(float(output[name]) for output in outputs) for name in outputs[0]}

    def _run(self, items: list[Any], step: Callable[..., Any], *, forward_only: bool) -> list[dict[str, Tensor]]:
        rows, length = items[0][1].shape
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(items),
            model=self._chunks,
            num_microbatches=len(items),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )

    def _score(self, items: Iterator[Any], chunk: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        _, tokens, labels = next(items)

        def finish(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return hidden.new_zeros(()), {"logps": _sequence_logps(hidden, labels, chunk)}

        return _forward(chunk, tokens), finish

    def _train(
        self, items: Iterator[Any], chunk: nn.Module, *, counts: BatchCounts, scale: int
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch, tokens, labels, ref_logps = next(items)

        def finish(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss, sums = self._objective(_sequence_logps(hidden, labels, chunk), ref_logps, batch, counts)
            return (loss * scale).float(), {"loss": loss.detach().clone(), **sums}

        return _forward(chunk, tokens), finish

    def _objective(
        self, logps: Tensor, ref_logps: Tensor, batch: KTOBatch, counts: BatchCounts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        (policy, pairs), (ref, ref_pairs) = logps.split(batch.size), ref_logps.split(batch.size)
        settings, tokens = self._settings, batch.samples.num_response_tokens
        ratios = log_ratios(pairs.detach(), ref_pairs, batch.kl_rows.num_response_tokens, settings)
        kl_ref = reference_point(kl_partial_sum(ratios, batch.has_partner, settings), counts, settings)
        loss = kto_loss(policy, ref, tokens, batch.desirable, kl_ref, counts, settings)
        reward = rewards(log_ratios(policy, ref, tokens, settings), settings).detach()
        desirable = batch.desirable
        return loss, {
            "rewards_desirable": reward[desirable].sum(),
            "rewards_undesirable": reward[~desirable].sum(),
            "logps_desirable": policy.detach()[desirable].sum(),
            "logps_undesirable": policy.detach()[~desirable].sum(),
            "correct": ((reward > kl_ref) == desirable).double().sum(),
            "kl_ref": kl_ref * batch.size,
        }

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        """Policy out into fresh memory, reference in, policy back."""
        policy = [parameter.detach().clone() for parameter in self._parameters]
        self._fill(self._reference)
        yield
        self._fill(policy)
        self.bytes_moved += 3 * sum(tensor.numel() * tensor.element_size() for tensor in policy)

    @torch.no_grad()
    def _fill(self, weights: list[Tensor]) -> None:
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.copy_(weight)


def _doubled(batch: KTOBatch) -> tuple[Tensor, Tensor]:
    """Tokens and labels of the 2 B rows, [2 B, S]: the samples, then the pairs, padded to one length."""
    tokens, labels = (
        [getattr(rows, name) for rows in (batch.samples, batch.kl_rows)] for name in ("tokens", "labels")
    )
    width = max(block.size(1) for block in tokens)
    return _padded(tokens, width, 0), _padded(labels, width, IGNORE)


def _padded(blocks: list[Tensor], width: int, value: int) -> Tensor:
    return torch.cat([nn.functional.pad(block, (0, width - block.size(1)), value=value) for block in blocks])


def _forward(chunk: nn.Module, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    return chunk(tokens, positions, None)


def _sequence_logps(hidden: Tensor, labels: Tensor, chunk: nn.Module) -> Tensor:
    """[S, 2 B, H] -> [2 B] float64 nats, by way of the logits of every position."""
    logits = unwrap(chunk).logits(hidden).transpose(0, 1).float()
    scored = labels != IGNORE
    token_logps = torch.log_softmax(logits, dim=-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    return token_logps.masked_fill(~scored, 0).double().sum(dim=1)
