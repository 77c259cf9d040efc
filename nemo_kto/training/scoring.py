"""Log-probs of a whole data set under one set of weights, spread over ranks. No gradient, no optimizer, no files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_kto.data.batch import KTOBatch
from nemo_kto.data.collate import BatchLayout, collate_step
from nemo_kto.data.store import TokenStore
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.gpt.forward import Passes

_MICRO_BATCHES_PER_PASS = 8  # enough to keep a pipeline busy, few enough that tokens and results stay small


def score_store(
    passes: Passes, store: TokenStore, groups: ParallelGroups, micro_batch_size: int
) -> tuple[Tensor, Tensor]:
    """Score every row.

    Rows are visited by length, packed, and come back in the store's order.

    Args:
        passes: the model.
        store: n rows.
        groups: the layout; rows are shared out over data-parallel ranks.
        micro_batch_size: a forward takes so many times the longest row, in tokens.

    Returns:
        On every rank: [n] float64 nats, sum of log p over response tokens; [n] int64, their number.
    """
    order = np.argsort(store.lengths(np.arange(len(store))), kind="stable")
    layout = BatchLayout(
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        micro_batch_size=micro_batch_size,
        pad_id=0,
        seq_length=store.summary.longest_row,
        pad_multiple=1,
        needs_kl=False,
        packing=True,
        stages=groups.pp_size,
    )
    logps = torch.zeros(len(store), dtype=torch.float64, device=groups.device)
    tokens = torch.zeros(len(store), dtype=torch.int64, device=groups.device)
    width = micro_batch_size * groups.dp_size * _MICRO_BATCHES_PER_PASS
    for start in range(0, len(store), width):
        share = collate_step(store, order[start : start + width], layout).to(groups.device)
        _score_share(passes, share.micro_batches, logps, tokens)
    if groups.dp_size > 1 and groups.is_last_stage:
        dist.all_reduce(logps, group=groups.dp)
        dist.all_reduce(tokens, group=groups.dp)
    if groups.pp_size > 1:
        dist.broadcast(logps, groups.last_stage_rank, group=groups.pp)
        dist.broadcast(tokens, groups.last_stage_rank, group=groups.pp)
    return logps, tokens


def _score_share(passes: Passes, batches: Sequence[KTOBatch], logps: Tensor, tokens: Tensor) -> None:
    """Write this rank's rows into ``logps`` and ``tokens``; other rows stay 0."""
    scored = passes.score([batch.samples for batch in batches])
    for values, batch in zip(scored, batches, strict=bool(scored)):
        logps[batch.index] = values
        tokens[batch.index] = batch.samples.num_response_tokens
