"""The batch that flows through a training step, with every tensor's shape, dtype and unit. Not for building one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_kto.objective.counts import BatchCounts

IGNORE = -100
"""Label of a position whose next token is not scored (prompt, padding)."""


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, ready for a causal decoder: padded to one length, or packed one after the other.

    A row is prompt + response without its last token, which predicts nothing; a row with nothing to score has one
    token.

    Attributes:
        tokens: padded: [B, S] int64, any valid id on the right. Packed: [1, T] int64, the B rows one after the other.
        labels: as ``tokens``: what each position must predict where that is a token of the response, else ``IGNORE``.
        lengths: None where the rows are padded. Packed: how many of the T positions each row has; they add up to T,
            and no row attends to another.
    """

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """Number of rows B."""
        return self.tokens.size(0) if self.lengths is None else len(self.lengths)

    @property
    def response_mask(self) -> Tensor:
        """As ``tokens``, bool: positions that predict a response token."""
        return self.labels != IGNORE

    @property
    def row_of_position(self) -> Tensor:
        """As ``tokens``, int64: the row, in [0, B), that each position belongs to."""
        numbers = torch.arange(self.count, device=self.tokens.device)
        if self.lengths is None:
            return numbers[:, None].expand_as(self.tokens)
        lengths = torch.tensor(self.lengths, device=self.tokens.device)
        return torch.repeat_interleave(numbers, lengths, output_size=self.tokens.size(1))[None]

    @property
    def num_response_tokens(self) -> Tensor:
        """[B] int64: scored tokens per row."""
        if self.lengths is None:
            return self.response_mask.sum(dim=1)
        return torch.bincount(self.row_of_position[self.response_mask], minlength=self.count)

    def to(self, device: torch.device) -> Rows:
        """The same rows on ``device``."""
        tokens, labels = (tensor.to(device, non_blocking=True) for tensor in (self.tokens, self.labels))
        return replace(self, tokens=tokens, labels=labels)


@dataclass(frozen=True)
class ForwardSize:
    """How many rows one forward takes.

    Attributes:
        rows: most rows of a forward, where rows are padded.
        tokens: most tokens of a forward, where they are packed; None where they are padded.
        multiple: positions of a forward are a multiple of it (of the tensor-parallel size, with sequence parallelism).
    """

    rows: int
    tokens: int | None = None
    multiple: int = 1


def split_rows(rows: Sequence[Rows]) -> list[Rows]:
    """Every row by itself, padded to nothing: entries of one row each, in order."""
    pieces: list[Rows] = []
    for entry in rows:
        lengths = entry.lengths or [entry.tokens.size(1)] * entry.count
        tokens, labels = (torch.split(t.flatten(), list(lengths)) for t in (entry.tokens, entry.labels))
        for ids, targets in zip(tokens, labels, strict=True):
            scored = torch.nonzero(targets != IGNORE)
            length = int(scored[-1]) + 1 if len(scored) else 1
            pieces.append(Rows(ids[None, :length], targets[None, :length]))
    return pieces


def regroup(rows: Sequence[Rows], size: ForwardSize | None) -> list[Rows]:
    """The same rows in the same order, cut anew into entries of ``size``.

    Args:
        rows: entries of any number of rows.
        size: of an entry of the result; a single row may exceed it. None leaves the entries as they are.
    """
    if size is None:
        return list(rows)
    groups: list[list[Rows]] = []
    room = 0
    for piece in split_rows(rows):
        length = piece.tokens.size(1) if size.tokens is not None else 1
        if not groups or length > room:
            groups.append([])
            room = size.rows if size.tokens is None else size.tokens
        groups[-1].append(piece)
        room -= length
    join = join_padded if size.tokens is None else join_packed
    return [join([p.tokens[0] for p in group], [p.labels[0] for p in group], size.multiple) for group in groups]


def join_padded(tokens: Sequence[Tensor], labels: Sequence[Tensor], multiple: int, pad_id: int = 0) -> Rows:
    """One entry of rows that are padded to the longest, and to a multiple of ``multiple``.

    Args:
        tokens: B tensors [length] int64.
        labels: the same of labels.
        multiple: of the padded length.
        pad_id: any valid token id.
    """
    width = _round_up(max(len(ids) for ids in tokens), multiple)
    joined = Rows(torch.full((len(tokens), width), pad_id), torch.full((len(tokens), width), IGNORE))
    joined = joined.to(tokens[0].device)
    for row, (ids, targets) in enumerate(zip(tokens, labels, strict=True)):
        joined.tokens[row, : len(ids)], joined.labels[row, : len(ids)] = ids, targets
    return joined


def join_packed(tokens: Sequence[Tensor], labels: Sequence[Tensor], multiple: int, pad_id: int = 0) -> Rows:
    """One entry of rows one after the other; see :func:`join_padded`. What pads the entry belongs to its last row."""
    lengths = [len(ids) for ids in tokens]
    spare = _round_up(sum(lengths), multiple) - sum(lengths)
    pads = tokens[0].new_full((spare,), pad_id), labels[0].new_full((spare,), IGNORE)
    joined = torch.cat([*tokens, pads[0]])[None], torch.cat([*labels, pads[1]])[None]
    return Rows(*joined, lengths=(*lengths[:-1], lengths[-1] + spare))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def ungroup(values: Sequence[Tensor], rows: Sequence[Rows]) -> list[Tensor]:
    """Numbers per row, one tensor per group of :func:`regroup`, cut as the ``rows`` were: [B_i] per entry."""
    return list(torch.split(torch.cat(list(values)), [entry.count for entry in rows]))


@dataclass(frozen=True)
class KTOBatch:
    """One micro-batch of B samples (x_i, y_i, p_i) and mismatched pairs (x_i, y_m(i)). Replicated over TP and PP.

    Attributes:
        samples: rows of (x_i, y_i).
        kl_rows: rows of (x_i, y_m(i)). A row without partner has no label to score.
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
