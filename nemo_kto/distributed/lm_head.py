"""The LM head as one differentiable function: projection, log-softmax and choice of the target, chunk by chunk.

Not for callers: :func:`nemo_kto.distributed.logprobs.response_logprobs` states the contract and chooses the chunks.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of softmax and sums under a head of ``dtype``: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, group: dist.ProcessGroup, *, vocab_size: int, rows: int
) -> Tensor:
    """Log-probs [T] as in :func:`~nemo_kto.distributed.logprobs.response_logprobs`, from ``rows`` rows at a time."""
    # inside autograd.Function one sees which inputs need a gradient, but not whether a graph is recorded at all
    plan = _Plan(group, vocab_size, rows, keep=torch.is_grad_enabled())
    return cast(Tensor, _ChunkedHead.apply(hidden, weight, targets, plan))  # type: ignore[no-untyped-call]


class _Plan(NamedTuple):
    group: dist.ProcessGroup
    vocab_size: int
    rows: int
    keep: bool
    """Whether a backward may follow."""


class _ChunkedHead(Function):
    """See :func:`chunked_logprobs`.

    Keeps its inputs and two numbers per row, and computes a chunk's logits again in backward. Where there is one chunk
    alone it keeps that one's exponentials, which saves the second projection and is no more than backward needs.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, plan: _Plan) -> Tensor:
        first = plan.group.rank() * weight.shape[0]
        num_real = min(max(plan.vocab_size - first, 0), weight.shape[0])
        owned = (targets >= first) & (targets < first + num_real)
        columns = (targets - first).masked_fill(~owned, 0)

        chunks = _slices(hidden.shape[0], plan.rows)
        buffers = _Buffers(weight, min(plan.rows, hidden.shape[0]))
        peaks = buffers.logits.new_full(targets.shape, -torch.inf)  # of a rank that holds padding alone they stay so
        sums, at_target = torch.empty_like(peaks), torch.empty_like(peaks)
        for chunk in chunks:
            logits = buffers.project(hidden[chunk])
            real = logits[:, :num_real]
            if num_real > 0:
                peaks[chunk] = real.amax(dim=1)
            at_target[chunk] = logits.gather(1, columns[chunk, None]).squeeze(1)
            sums[chunk] = real.sub_(peaks[chunk, None]).exp_().sum(dim=1)

        logps, scales = _joined(peaks, sums, at_target, owned, plan.group)
        ctx.save_for_backward(hidden, weight, columns, owned, peaks, scales)
        ctx.plan, ctx.num_real = plan, num_real
        ctx.exponentials = buffers.logits if plan.keep and len(chunks) == 1 else None
        return logps.masked_fill_((targets < 0) | (targets >= plan.vocab_size), torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, columns, owned, peaks, scales = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        # d logp / d logit = onehot - softmax, and softmax = exp(logit - peak) * scale.
        factors = -grad_logps * scales
        at_target = grad_logps.masked_fill(~owned, 0)

        chunks = _slices(hidden.shape[0], ctx.plan.rows)
        # what was kept is overwritten below: should the graph be retained, the next backward projects again
        kept, ctx.exponentials = ctx.exponentials, None
        buffers = _Buffers(weight, min(ctx.plan.rows, hidden.shape[0]), kept)
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
        grad_weight = _WeightGradient(weight, len(chunks)) if needs_weight else None
        for chunk in chunks:
            if kept is None:
                buffers.project(hidden[chunk])[:, : ctx.num_real].sub_(peaks[chunk, None]).exp_()
            grad = buffers.logits[: columns[chunk].shape[0]]
            grad[:, : ctx.num_real].mul_(factors[chunk, None])
            grad[:, ctx.num_real :] = 0
            grad.scatter_add_(1, columns[chunk, None], at_target[chunk, None])
            grad = buffers.in_weights_dtype(grad)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad @ weight
            if grad_weight is not None:
                grad_weight.add(grad, hidden[chunk])
        if grad_hidden is not None and ctx.plan.group.size() > 1:
            dist.all_reduce(grad_hidden, group=ctx.plan.group)
        return grad_hidden, None if grad_weight is None else grad_weight.rounded(), None, None


def _slices(num_rows: int, step: int) -> list[slice]:
    """Slices of at most ``step`` rows, at least one: products of no rows give the zeros that are wanted."""
    return [slice(start, min(start + step, num_rows)) for start in range(0, max(num_rows, 1), step)]


def _joined(
    peaks: Tensor, sums: Tensor, at_target: Tensor, owned: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """From each rank's peaks, sums of exp(logit - peak), and target logits where it owns them, all [T].

    Returns:
        [T] log-probs, and [T] what this rank's exp(logit - peak) are to be multiplied with to be probabilities.
    """
    highest = peaks
    if group.size() > 1:
        highest = peaks.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    shrink = (peaks - highest).exp_()
    packed = torch.stack([sums * shrink, (at_target - highest).masked_fill_(~owned, 0)])
    if group.size() > 1:
        dist.all_reduce(packed, group=group)
    return packed[1] - packed[0].log(), shrink.div_(packed[0])


class _Buffers:
    """The [rows, V / TP] tensors that chunk after chunk is computed in.

    Not fresh ones for each: a CPU's allocator gives blocks of this size back at once, and mapping their pages again
    costs as much as the arithmetic.

    Args:
        weight: [V / TP, H].
        rows: of the largest chunk.
        logits: what an earlier ``logits`` held.
    """

    def __init__(self, weight: Tensor, rows: int, logits: Tensor | None = None) -> None:
        self._weight = weight
        dtype = sum_dtype(weight.dtype)
        self.logits = weight.new_empty(rows, weight.shape[0], dtype=dtype) if logits is None else logits
        self._narrow = self.logits if weight.dtype == dtype else torch.empty_like(self.logits, dtype=weight.dtype)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits of ``hidden``, computed in the weight's dtype: the first rows of ``logits``."""
        narrow = self._narrow[: hidden.shape[0]]
        torch.mm(hidden.to(self._weight.dtype), self._weight.t(), out=narrow)
        logits = self.logits[: hidden.shape[0]]
        return logits if self._narrow is self.logits else logits.copy_(narrow)

    def in_weights_dtype(self, rows: Tensor) -> Tensor:
        """The first rows of ``logits``, which are passed, for products with tensors of the weight's dtype."""
        return rows if self._narrow is self.logits else self._narrow[: rows.shape[0]].copy_(rows)


class _WeightGradient:
    """Sum over chunks of (gradient of logits)^T x hidden, [V / TP, H].

    One chunk's product is rounded to the weight's dtype as it is. Several are summed in float32, in place where the
    product can add to a float32 matrix: for a float32 head, and in bfloat16 on CUDA where torch offers it. Elsewhere
    (bfloat16 on a CPU, torch before it) each chunk's product is rounded to the weight's dtype in a second buffer and
    then added: each rounding is 2^-9 of one chunk's part, and the sum itself is not rounded.
    """

    def __init__(self, weight: Tensor, num_chunks: int) -> None:
        self._dtype, self._num_added = weight.dtype, 0
        dtype = weight.dtype if num_chunks == 1 else sum_dtype(weight.dtype)
        self._sum = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
        in_place = dtype == weight.dtype or _products_add_to_float32(weight.device, weight.dtype)
        self._product = None if in_place else torch.empty_like(self._sum, dtype=weight.dtype)

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        factors = (grad_logits.t(), hidden.to(self._dtype))
        beta = min(self._num_added, 1)  # 0 ignores what the new buffer holds
        self._num_added += 1
        if self._sum.dtype == self._dtype:
            self._sum.addmm_(*factors, beta=beta)
        elif self._product is None:
            torch.addmm(self._sum, *factors, beta=beta, out_dtype=self._sum.dtype, out=self._sum)
        else:
            torch.mm(*factors, out=self._product)
            self._sum.add_(self._product) if beta else self._sum.copy_(self._product)

    def rounded(self) -> Tensor:
        """The sum in the weight's dtype."""
        return self._sum.to(self._dtype) if self._product is None else self._product.copy_(self._sum)


@cache
def _products_add_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of ``dtype`` matrices can be added to a float32 one. Tried, as it depends on torch's build."""
    if device.type != "cuda":
        return False
    factor = torch.ones(16, 16, device=device, dtype=dtype)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # no such kernel in this build, or no such argument in this release
        return False
    return bool((total == 17).all())
