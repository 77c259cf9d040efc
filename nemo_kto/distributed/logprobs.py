"""Log-probabilities of given tokens under a vocabulary-sharded head. Not for choosing which positions to score.

Nothing here knows Megatron: the tensor-parallel group is an argument, and the rank inside it tells which columns of
the vocabulary this rank holds.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def vocab_parallel_logprobs(logits: Tensor, targets: Tensor, group: dist.ProcessGroup, *, vocab_size: int) -> Tensor:
    """Log-probability of each target under a softmax whose columns are spread over ``group``.

    Rank r holds the columns [r * shard, (r + 1) * shard). Those at or beyond ``vocab_size`` pad the vocabulary to a
    multiple of the group: they count as -inf and get no gradient. Two all-reduces forward (the maximum; then sum-exp
    and target logit in one), none backward; none at all in a group of one.

    Args:
        logits: [T, V_padded / TP] float, vocabulary-sharded over ``group``. Gradient flows, in this dtype. Unchanged.
        targets: [T] int64 ids of the whole vocabulary, replicated. An id outside [0, vocab_size) gives NaN.
        group: tensor-parallel group. T must be equal on all its ranks, and may be 0.
        vocab_size: number of real columns over all ranks.

    Returns:
        [T] float32, nats, replicated over ``group``.
    """
    return cast(Tensor, _VocabParallelLogProbs.apply(logits, targets, group, vocab_size))  # type: ignore[no-untyped-call]


def response_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, group: dist.ProcessGroup, *, vocab_size: int
) -> Tensor:
    """Log-probability of each target from the final hidden states of the positions that predict them.

    Args:
        hidden: [T, H] float, after the final norm, response positions only, replicated over ``group``. Its gradient
            is all-reduced over ``group``, because each rank's is the part that its columns of the vocabulary cause.
        weight: [V_padded / TP, H], this rank's rows of the head (or of the tied embedding). Its gradient is local.
            The projection runs in this dtype.
        targets: [T] int64, the tokens to score, replicated.
        group: tensor-parallel group.
        vocab_size: number of real rows of the head over all ranks.

    Returns:
        [T] float32, nats, replicated over ``group``.
    """
    replicated = cast(Tensor, _ReplicatedInput.apply(hidden, group))  # type: ignore[no-untyped-call]
    logits = replicated.to(weight.dtype) @ weight.t()
    return vocab_parallel_logprobs(logits, targets, group, vocab_size=vocab_size)


def sequence_sums(token_logps: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Sum token log-probabilities by row.

    In float64: a log-ratio is a small difference between two sums of hundreds of nats, where a float32 sum already
    rounds by 1e-5, and the KL is a mean of such differences.

    Args:
        token_logps: [T] float, nats. Gradient flows.
        rows: [T] int64, the row that each token belongs to, in [0, num_rows).
        num_rows: number of rows B; rows without tokens get 0.

    Returns:
        [B] float64, nats.
    """
    sums = torch.zeros(num_rows, dtype=torch.float64, device=token_logps.device)
    # index_put accumulates in a fixed order on CUDA, where index_add uses atomics: resuming must repeat every bit.
    return sums.index_put((rows,), token_logps.double(), accumulate=True)


class _ReplicatedInput(Function):
    """Identity whose gradient is summed over the group: the entry of a replicated tensor into a sharded product."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.group.size() > 1:
            grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may hand the same buffer to others
            dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _VocabParallelLogProbs(Function):
    """See :func:`vocab_parallel_logprobs`. Keeps the logits and one number per row; the softmax is made again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup, vocab_size: int) -> Tensor:
        first = group.rank() * logits.shape[1]
        num_real = min(max(vocab_size - first, 0), logits.shape[1])
        columns = targets - first
        owned = (columns >= 0) & (columns < num_real)
        columns = columns.masked_fill(~owned, 0)

        peak = _global_peak(logits[:, :num_real], group)
        at_target = logits.gather(1, columns[:, None]).squeeze(1).float() - peak
        sum_exp = (logits[:, :num_real].float() - peak[:, None]).exp_().sum(dim=1)
        packed = torch.stack([sum_exp, at_target.masked_fill(~owned, 0)])
        if group.size() > 1:
            dist.all_reduce(packed, group=group)
        log_sum = packed[0].log()
        ctx.save_for_backward(logits, columns, owned, peak + log_sum)
        ctx.num_real = num_real
        return (packed[1] - log_sum).masked_fill((targets < 0) | (targets >= vocab_size), torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor, None, None, None]:
        logits, columns, owned, log_normalizer = ctx.saved_tensors
        # d logp / d logit = onehot - softmax.
        grad = logits.float() - log_normalizer[:, None]
        grad.exp_().mul_(-grad_logps[:, None])
        grad[:, ctx.num_real :] = 0
        grad.scatter_add_(1, columns[:, None], grad_logps.masked_fill(~owned, 0)[:, None])
        return grad.to(logits.dtype), None, None, None


def _global_peak(real_logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T] float32, largest real logit of each row over all ranks. A rank may hold padding alone."""
    if real_logits.shape[1] == 0:
        peak = torch.full((real_logits.shape[0],), -torch.inf, device=real_logits.device)
    else:
        peak = real_logits.amax(dim=1).float()
    if group.size() > 1:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    return peak
