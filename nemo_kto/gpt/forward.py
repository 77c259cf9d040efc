"""Where mathematics meets Megatron's pipeline schedule: rows in, sequence log-probs or gradients out.

Knows nothing of KTO: the objective is a function it is given. Inside the loss closure the only collectives are those
of tensor parallelism; sums over data-parallel ranks and micro-batches are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from torch import Tensor, nn

from nemo_kto.data.batch import ForwardSize, KTOBatch, Rows, regroup, ungroup
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.distributed.logprobs import response_logprobs, sequence_sums
from nemo_kto.gpt.build import has_transformer_engine, unwrap

Objective: TypeAlias = Callable[[Tensor, KTOBatch], tuple[Tensor, dict[str, Tensor]]]
"""(policy log-probs [B] float64 nats, with gradient; the micro-batch) -> (this micro-batch's addend of the global
loss, detached sums for metrics)."""


class Passes:
    """The passes of one model over its data-parallel share of a batch.

    Every rank of a pipeline calls the same method with the same rows. Results exist on the last stage, equal on all of
    its tensor-parallel ranks; other stages get empty lists.

    Args:
        chunks: model chunks of this rank, wrapped or not.
        groups: the parallel layout.
        vocab_size: true vocabulary, without padding columns.
    """

    def __init__(self, chunks: Sequence[nn.Module], groups: ParallelGroups, vocab_size: int) -> None:
        self._chunks = list(chunks)
        self._groups = groups
        self._vocab_size = vocab_size
        self._schedule = get_forward_backward_func()

    def score(self, rows: Sequence[Rows], size: ForwardSize | None = None) -> list[Tensor]:
        """Sequence log-probs as :meth:`log_probs` gives them, of rows that may be grouped anew for the forward.

        Args:
            rows: one entry per training micro-batch, B_i rows each.
            size: of a forward. None takes the entries as they are, so that it repeats a training pass's arithmetic.

        Returns:
            On the last stage, per entry of ``rows``, [B_i] float64 nats. Elsewhere an empty list.
        """
        logps = self.log_probs(regroup(rows, size))
        return ungroup(logps, rows) if logps else []

    @torch.no_grad()
    def log_probs(self, rows: Sequence[Rows]) -> list[Tensor]:
        """Sequence log-probs without gradient, in eval mode, leaving training mode and random streams as they were.

        Args:
            rows: one entry per forward pass, B_i rows each.

        Returns:
            On the last stage, per entry of ``rows``, [B_i] float64 nats: sum of log p over the labelled tokens (0 for
            a row without labels). Elsewhere an empty list.
        """
        if not rows:
            return []
        with _evaluating(self._chunks), _random_forked():
            outputs = self._run(rows, self._score_step, forward_only=True)
        return [out["logps"] for out in outputs] if self._groups.is_last_stage else []

    def train(self, batches: Sequence[KTOBatch], objective: Objective) -> dict[str, Tensor]:
        """Forward and backward over all micro-batches; gradients land in Megatron's buffers.

        Megatron divides each micro-batch's loss by their number M, and its data-parallel wrapper averages gradients
        over DP; an addend of a *sum* over the global batch is therefore returned to the schedule times M x DP.

        Args:
            batches: this rank's M micro-batches, with reference columns.
            objective: see :data:`Objective`.

        Returns:
            On the last stage, the objective's metric sums and ``loss`` (its addends), added over micro-batches.
        """
        scale = len(batches) * self._groups.dp_size
        outputs = self._run(batches, partial(self._train_step, objective=objective, scale=scale), forward_only=False)
        totals: dict[str, Tensor] = {}
        for output in outputs:
            for name, value in output.items():
                totals[name] = totals[name] + value if name in totals else value
        return totals

    def _run(self, items: Sequence[Any], step: Callable[..., Any], *, forward_only: bool) -> list[dict[str, Tensor]]:
        first = items[0] if isinstance(items[0], Rows) else items[0].samples
        outputs: list[dict[str, Tensor]] = self._schedule(
            forward_step_func=step,
            data_iterator=iter(items),
            model=self._chunks,
            num_microbatches=len(items),
            seq_length=first.tokens.size(1),
            micro_batch_size=first.tokens.size(0),
            forward_only=forward_only,
        )
        return outputs

    def _score_step(self, items: Iterator[Rows], chunk: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        rows = next(items)

        def finish(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return hidden.new_zeros(()), {"logps": self._sequence_logps(hidden, rows, chunk)}

        return _forward(chunk, rows), finish

    def _train_step(
        self, items: Iterator[KTOBatch], chunk: nn.Module, *, objective: Objective, scale: int
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(items)

        def finish(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            addend, sums = objective(self._sequence_logps(hidden, batch.samples, chunk), batch)
            # the schedule divides the returned tensor in place: what is kept must be a tensor of its own
            return (addend * scale).float(), {"loss": addend.detach().clone(), **sums}

        return _forward(chunk, batch.samples), finish

    def _sequence_logps(self, hidden: Tensor, rows: Rows, chunk: nn.Module) -> Tensor:
        """[S, B, H] final hidden states (S / TP under sequence parallelism) -> [B] float64 nats, differentiable."""
        gpt = unwrap(chunk)
        if gpt.config.sequence_parallel:
            # the head's input gradient is all-reduced over TP by response_logprobs; this rank then takes its slice
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self._groups.tp
            )
        scored = rows.response_mask.nonzero(as_tuple=True)  # once: on a GPU each look for them waits for the device
        token_logps = response_logprobs(
            hidden.transpose(0, 1)[scored],
            gpt.head_weight(),
            rows.labels[scored],
            self._groups.tp,
            vocab_size=self._vocab_size,
        )
        return sequence_sums(token_logps, rows.row_of_position[scored], rows.count)


def _forward(chunk: nn.Module, rows: Rows) -> Tensor:
    """One pipeline stage over one micro-batch. Causal attention over rows padded on the right needs no mask."""
    positions = torch.arange(rows.tokens.size(1), device=rows.tokens.device).expand_as(rows.tokens)
    packing = {} if rows.lengths is None else {"packed_seq_params": _packed(rows.lengths, rows.tokens.device)}
    hidden: Tensor = chunk(rows.tokens, positions, None, **packing)
    return hidden


def _packed(lengths: tuple[int, ...], device: torch.device) -> PackedSeqParams:
    """Where rows begin; rotary positions restart there.

    Megatron needs the longest row's length for it: given the whole entry's, it counts on from row to row, in silence.
    Only Transformer Engine's kernels read the starts on the device. Our attention and Megatron's rotary embedding make
    numbers of them in every layer, which would wait for the device there.
    """
    place = device if has_transformer_engine() else torch.device("cpu")
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=place)
    longest = max(lengths)
    return PackedSeqParams("thd", starts, starts, max_seqlen_q=longest, max_seqlen_kv=longest)


@contextmanager
def _evaluating(chunks: Sequence[nn.Module]) -> Iterator[None]:
    modes = [(module, module.training) for chunk in chunks for module in chunk.modules()]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _random_forked() -> Iterator[None]:
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            tracker.set_states(states)
