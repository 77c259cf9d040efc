"""The batch that flows through a training step, with every tensor's shape, dtype and unit. Not for building one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemo_kto.objective.counts import BatchCounts

IGNORE = -100
"""Label of a position whose next token is not scored (prompt, padding)."""


@dataclass(frozen=True)
class Rows:
    """Right-padded rows of tokens, B rows of S positions, ready for a causal decoder.

    Attributes:
        tokens: [B, S] int64, prompt + response, padded on the right with any valid id.
        labels: [B, S] int64, ``labels[b, t]`` is the token that position t must predict (``tokens[b, t + 1]``) where
            that token belongs to the response, else ``IGNORE``.
    """

    tokens: Tensor
    labels: Tensor

    @property
    def response_mask(self) -> Tensor:
        """[B, S] bool: positions that predict a response token."""
        return self.labels != IGNORE

    @property
    def num_response_tokens(self) -> Tensor:
        """[B] int64: scored tokens per row."""
        return self.response_mask.sum(dim=1)

    def to(self, device: torch.device) -> Rows:
        """The same rows on ``device``."""
        return Rows(self.tokens.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))


def regroup(rows: Sequence[Rows], size: int) -> list[Rows]:
    """The same rows in the same order, cut anew into groups of ``size`` and padded to each group's longest row.

    Groups that have that size already keep their tensors, padding included, so that a pass over them is bit-equal.
    """
    if all(r.tokens.size(0) == size for r in rows[:-1]) and (not rows or rows[-1].tokens.size(0) <= size):
        return list(rows)
    tokens = [row for r in rows for row in r.tokens]
    labels = [row for r in rows for row in r.labels]
    return [
        Rows(
            pad_sequence(tokens[i : i + size], batch_first=True, padding_value=0),
            pad_sequence(labels[i : i + size], batch_first=True, padding_value=IGNORE),
        )
        for i in range(0, len(tokens), size)
    ]


def split_rows(rows: Sequence[Rows]) -> list[Rows]:
    """The same rows in the same order, each for itself, padded as it was: views, one row each."""
    return [Rows(r.tokens[i : i + 1], r.labels[i : i + 1]) for r in rows for i in range(r.tokens.size(0))]


def ungroup(values: Sequence[Tensor], rows: Sequence[Rows]) -> list[Tensor]:
    """Numbers per row, one tensor per group of :func:`regroup`, cut as the ``rows`` were: [B_i] per entry."""
    return list(torch.split(torch.cat(list(values)), [r.tokens.size(0) for r in rows]))


@dataclass(frozen=True)
class KTOBatch:
    """One micro-batch of B samples (x_i, y_i, p_i) and mismatched pairs (x_i, y_m(i)). Replicated over TP and PP.

    Attributes:
        samples: rows of (x_i, y_i).
        kl_rows: rows of (x_i, y_m(i)). A row without partner repeats x_i alone, with no label to score.
        desirable: [B] bool, p_i.
        has_partner: [B] bool, whether the KL row counts.
        index: [B] int64, position of the record in the data set (validated, kept records, file order).
        ref_logps: [B] float64, nats: sum over response tokens of log pi_ref(y_i | x_i). None until scored.
        ref_kl_logps: [B] float64, nats: the same for (x_i, y_m(i)). None until scored.
    """

    samples: Rows
    kl_rows: Rows
    desirable: Tensor
    has_partner: Tensor
    index: Tensor
    ref_logps: Tensor | None = None
    ref_kl_logps: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of samples B."""
        return self.desirable.numel()

    def to(self, device: torch.device) -> KTOBatch:
        """The same batch on ``device``."""
        return replace(
            self,
            samples=self.samples.to(device),
            kl_rows=self.kl_rows.to(device),
            desirable=self.desirable.to(device, non_blocking=True),
            has_partner=self.has_partner.to(device, non_blocking=True),
            index=self.index.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class StepBatch:
    """This data-parallel rank's share of one global batch, cut into micro-batches, with the global counts.

    Attributes:
        micro_batches: in order; none where the global batch has fewer samples than there are ranks.
        counts: of the global batch.
        number: the training step (from 0, across epochs) that this batch is for; None in validation.
        upcoming: shares of the steps that come next, for whoever looks ahead. They have none themselves.
    """

    micro_batches: tuple[KTOBatch, ...]
    counts: BatchCounts
    number: int | None = None
    upcoming: tuple[StepBatch, ...] = ()

    def __iter__(self) -> Iterator[KTOBatch]:
        return iter(self.micro_batches)

    def to(self, device: torch.device) -> StepBatch:
        """The same share on ``device``, and those that come next."""
        return replace(
            self,
            micro_batches=tuple(b.to(device) for b in self.micro_batches),
            upcoming=tuple(step.to(device) for step in self.upcoming),
        )
