"""What makes two log-probs of one row the same number: the name of the folder that a cache keeps them in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LOG_PROB_VERSION = 1
"""To be raised whenever the same weights and ids get other log-probs than before, beyond rounding: with a change of
attention, positions, norms, masks or the head (gpt/), of the sum over tokens (distributed/logprobs.py), or of what a
row's prompt and response are (reference/row_keys.py)."""


@dataclass(frozen=True)
class CacheIdentity:
    """A reference as far as its log-probs depend on it. Layouts are no part of it: they change rounding only.

    Attributes:
        weights: SHA-256 of the checkpoint's weights, as they are stored.
        dtype: that it is computed in, ``bf16`` or ``fp32``.
        network: shape and constants of the network, as JSON values.
        version: :data:`LOG_PROB_VERSION`.
    """

    weights: str
    dtype: str
    network: Mapping[str, Any]
    version: int = field(default=LOG_PROB_VERSION)

    @property
    def digest(self) -> bytes:
        """32 bytes: SHA-256 of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()

    def folder(self, root: str | Path) -> Path:
        """Where the log-probs of this reference are kept under a cache directory."""
        return Path(root) / self.digest.hex()[:32]
