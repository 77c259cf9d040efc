"""What a decoder looks like, as plain numbers read from a Hugging Face ``config.json``. No model is built here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency-dependent RoPE scaling, or ``linear`` interpolation (only ``factor`` is used)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Architecture:
    """A Llama-shaped decoder: RMSNorm, RoPE, SwiGLU, grouped-query attention. Sizes in elements, unsharded."""

    family: str
    """Hugging Face ``model_type``: llama, mistral, qwen2, qwen3."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Number of key/value heads."""
    head_dim: int
    vocab_size: int
    """True vocabulary: rows of the Hugging Face embedding, before any padding to a multiple of TP."""
    max_position_embeddings: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    sliding_window: int | None = None
    """Window of attention in tokens, if the model uses one; None is full attention."""
