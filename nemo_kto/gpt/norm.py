"""RMSNorm for Megatron's local layer spec. Megatron's own torch norm refuses sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm over the last dimension, with a weight that is replicated over TP.

    Input and output are [..., hidden_size] in the model's dtype; the mean is taken in float32. Under sequence
    parallelism each TP rank sees its own positions, so the weight's gradient is partial: the mark set here makes
    Megatron's ``finalize_model_grads`` sum it over TP.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
