"""Log-probabilities of given tokens under a vocabulary-sharded head. Not for choosing which positions to score.

Nothing here knows Megatron: the tensor-parallel group is an argument, and the rank inside it tells which columns of
the vocabulary this rank holds.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_kto.distributed.lm_head import chunked_logprobs, sum_dtype

CHUNK_BYTES = 256 * 2**20
"""Bytes that the float32 logits of one chunk of rows may take on a rank.

Each chunk reads the head, and reads and writes the float32 sum of its gradient: 8 bytes per element of the head, for
2 FLOPs per element and row. A GPU that does some 200 FLOPs in the time of a byte hides that behind several hundred
rows. 256 MiB are 512 rows of a vocabulary of 128k, and 4096 at TP 8, and still little beside such a head's own
gradient (2 GiB in float32 for 4096 hidden columns). On a CPU it only matters that a small model's micro-batch, up to
1365 tokens of a vocabulary of 48k, is one chunk, whose logits are not computed twice.
"""


def response_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup,
    *,
    vocab_size: int,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Log-probability of each target from the final hidden states of the positions that predict them.

    Softmax over columns that are spread over ``group``: rank r holds [r * shard, (r + 1) * shard). Those at or beyond
    ``vocab_size`` pad the vocabulary to a multiple of the group: they count as -inf and get no gradient. Rows are
    projected in equal chunks, so memory beyond inputs, outputs and gradients is that of one chunk's logits, whatever
    T is. Two all-reduces forward ([T] maxima; [2, T] sum-exps and target logits), one backward ([T, H], where
    ``hidden`` needs a gradient), whatever the number of chunks; none in a group of one.

    Args:
        hidden: [T, H] float, after the final norm, response positions only, replicated over ``group``. Its gradient
            is summed over ``group``, because each rank's is the part that its columns of the vocabulary cause.
        weight: [V_padded / TP, H], this rank's rows of the head (or of the tied embedding). Its gradient is local,
            summed over chunks in float32 and rounded once. The projection runs in this dtype, what follows in
            float32 (in float64 for a float64 weight).
        targets: [T] int64 ids of the whole vocabulary, replicated. An id outside [0, vocab_size) gives NaN.
        group: tensor-parallel group. T must be equal on all its ranks, and may be 0.
        vocab_size: number of real rows of the head over all ranks.
        chunk_bytes: bytes of a chunk's float32 logits, at least those of one row; :data:`CHUNK_BYTES` if None. A head
            in bfloat16 needs half as much again, for the logits in its own dtype.

    Returns:
        [T] float32 (float64 for a float64 weight), nats, replicated over ``group``. Gradients flow once: no double
        backward.
    """
    row_bytes = weight.shape[0] * sum_dtype(weight.dtype).itemsize
    most_rows = max(1, (CHUNK_BYTES if chunk_bytes is None else chunk_bytes) // row_bytes)
    num_chunks = max(1, -(-hidden.shape[0] // most_rows))
    rows = max(1, -(-hidden.shape[0] // num_chunks))
    return chunked_logprobs(hidden, weight, targets, group, vocab_size=vocab_size, rows=rows)


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
