"""Causal core attention by torch's fused kernels, for Megatron's local layer spec.

Megatron's own local attention holds an S x S score matrix per head and refuses packed sequences. This one holds
neither scores nor a mask, shares key/value heads without copying them where the kernel can, and takes packed rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule


class SDPAttention(MegatronModule):
    """``softmax(q k^T / sqrt(d)) v`` with a causal mask, on this TP rank's heads.

    Only causality masks. Rows that are shorter than the batch are padded on the right, where causality already keeps
    the padding from being seen; what the padding positions themselves compute is meaningless and must not be read.

    Raises:
        ValueError: context parallelism, or an attention that is not causal.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise ValueError("SDPAttention does not support context parallelism: set context_parallel_size to 1")
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(f"SDPAttention is causal self-attention, not {attn_mask_type} {attention_type}-attention")
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [s, b, heads / TP, d], or [t, heads / TP, d] when packed.
            key: [s, b, groups / TP, d], or [t, groups / TP, d] when packed.
            value: as ``key``.
            attention_mask: must be None.
            attn_mask_type: ignored, always causal.
            attention_bias: must be None.
            packed_seq_params: for ``qkv_format="thd"``, where each of the t tokens' rows begins. Rows do not see
                each other.

        Returns:
            [s, b, heads / TP * d], or [t, heads / TP, d] when packed.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("SDPAttention takes no mask and no bias: it is causal, and rows are padded on the right")
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # to [b, heads, s, d]
        return self._attend(query, key, value).permute(2, 0, 1, 3).flatten(2)

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        if packed.qkv_format != "thd":
            raise ValueError(f"SDPAttention packs as thd, not {packed.qkv_format}")
        starts = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        lengths = starts.diff().tolist()
        query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        # Row by row: a block-diagonal mask would cost t x t memory and was three times slower on CPU.
        rows = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._attend(*row) for row in rows], dim=2).squeeze(0).transpose(0, 1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[b, heads, s, d] with [b, groups, s, d] keys and values to [b, heads, s, d]."""
        grouped = query.size(1) != key.size(1)
        if grouped and query.is_cuda and query.dtype == torch.float32:
            # CUDA's only fused kernel for float32 takes no groups; left alone torch would build S x S scores.
            share = query.size(1) // key.size(1)
            key, value, grouped = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1), False
        dropout = self.dropout if self.training else 0.0
        with self._random_stream(dropout):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped, dropout_p=dropout
            )

    def _random_stream(self, dropout: float) -> AbstractContextManager[None]:
        """TP ranks hold different heads and need different noise. Sequence parallelism forks around whole blocks."""
        if dropout == 0.0 or self.config.sequence_parallel:
            return nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()
