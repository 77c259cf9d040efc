"""What a row is known by in the cache: a hash of exactly the ids that its log-prob depends on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from nemo_kto.data.batch import IGNORE, Rows


@dataclass(frozen=True)
class RowKey:
    """Of one row.

    Attributes:
        key: 16 bytes, a hash of the prompt's and the response's ids.
        num_tokens: scored tokens.
    """

    key: bytes
    num_tokens: int


def row_key(row: Rows) -> RowKey | None:
    """The key of a single row; None where nothing is scored.

    The prompt ends where the first token is predicted. Padding is no part of it, nor is the row's place in a batch.

    Args:
        row: one row, in host memory.
    """
    labels = row.labels.numpy().reshape(-1)
    scored = np.flatnonzero(labels != IGNORE)
    if not scored.size:
        return None
    prompt = row.tokens.numpy().reshape(-1)[: scored[0] + 1]
    response = labels[scored]
    # the lengths come first: no two pairs of sequences then have the same bytes
    data = np.concatenate([[prompt.size, response.size], prompt, response]).astype("<i8").tobytes()
    return RowKey(hashlib.blake2b(data, digest_size=16).digest(), int(response.size))
