"""How many parameters a rank holds, from the sizes of a network; and networks of usual sizes. Builds nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nemo_kto.config.architecture import Architecture, read_architecture
from nemo_kto.config.layout import padded_vocab_size
from nemo_kto.errors import ConfigError

_LLAMA2 = Architecture(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
    head_dim=128,
    vocab_size=32000,
    max_position_embeddings=4096,
    norm_epsilon=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
)
_LLAMA3 = replace(
    _LLAMA2,
    ffn_hidden_size=14336,
    num_query_groups=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_theta=500000.0,
)
SIZE_GROUPS = {
    "7b": _LLAMA2,
    "8b": _LLAMA3,
    "13b": replace(
        _LLAMA2,
        num_layers=40,
        hidden_size=5120,
        ffn_hidden_size=13824,
        num_attention_heads=40,
        num_query_groups=40,
    ),
    "70b": replace(_LLAMA3, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64),
}
"""Usual networks by size, for sizing without a model at hand.

7b and 13b are Llama 2's: layers, hidden size and heads from table 2 of arXiv 2302.13971, the rest from the
``config.json`` of Llama-2-7b-hf and Llama-2-13b-hf. 8b and 70b are Llama 3.1's: table 3 of arXiv 2407.21783, and the
vocabulary of 128,256 rows from ``config.json``.
"""


def read_shape(model: str) -> Architecture:
    """The network of a size group's name, of a Hugging Face directory, or of a ``config.json``.

    Raises:
        CheckpointError: the file cannot be read, or describes a network that is not supported.
        ConfigError: it is neither a name nor a path.
    """
    group = SIZE_GROUPS.get(model.lower())
    if group is not None:
        return group
    path = Path(model)
    if path.is_file() and path.name == "config.json":
        return read_architecture(path.parent)
    if path.is_dir():
        return read_architecture(path)
    raise ConfigError(
        f"--model {model}: neither a directory with config.json nor a size group ({', '.join(SIZE_GROUPS)})"
    )


def layer_matrices(arch: Architecture) -> int:
    """Elements of the matrices of one decoder layer, unsharded: qkv, output projection, gate and up, down."""
    attention = arch.hidden_size * (2 * arch.num_attention_heads + 2 * arch.num_query_groups) * arch.head_dim
    return attention + 3 * arch.hidden_size * arch.ffn_hidden_size


def layer_elements(arch: Architecture, tp: int) -> int:
    """Parameters of one decoder layer on one of ``tp`` ranks: matrices are sharded, norms are not."""
    vectors = 2 * arch.hidden_size
    if arch.qk_norm:
        vectors += 2 * arch.head_dim
    bias = (arch.num_attention_heads + 2 * arch.num_query_groups) * arch.head_dim if arch.qkv_bias else 0
    return (layer_matrices(arch) + bias) // tp + vectors


def vocabulary_elements(arch: Architecture, tp: int) -> int:
    """Elements of the embedding, or of the LM head, on one of ``tp`` ranks, padding included."""
    return padded_vocab_size(arch.vocab_size, tp) // tp * arch.hidden_size


def stage_elements(arch: Architecture, tp: int, pp: int, stage: int) -> int:
    """Parameters of a pipeline stage on one rank.

    Tied embeddings are held once where one stage has both ends, and twice, on the first and the last stage, in a
    pipeline.
    """
    count = arch.num_layers // pp * layer_elements(arch, tp)
    if stage == 0:
        count += vocabulary_elements(arch, tp)
    if stage == pp - 1:
        count += arch.hidden_size
        if pp > 1 or not arch.tied_embeddings:
            count += vocabulary_elements(arch, tp)
    return count


def adapter_elements(arch: Architecture, tp: int, rank: int) -> int:
    """Parameters of the LoRA adapters of one decoder layer on one rank, on all four linear layers.

    Of a column-parallel layer (qkv, gate and up) B is sharded, of a row-parallel one (projection, down) A is; the
    other matrix is whole on every rank (table in ``nemo_kto/gpt/lora.py``).
    """
    heads = arch.num_attention_heads * arch.head_dim
    qkv = (arch.num_attention_heads + 2 * arch.num_query_groups) * arch.head_dim
    sharded = qkv + 2 * arch.ffn_hidden_size + heads + arch.ffn_hidden_size
    return rank * (sharded // tp + 4 * arch.hidden_size)
