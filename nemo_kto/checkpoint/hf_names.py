"""Which Hugging Face tensors make up a Megatron parameter, and how to cut and join them. Pure: no files, no ranks.

Megatron names here count layers over all pipeline stages, from 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F

from nemo_kto.config.architecture import Architecture
from nemo_kto.config.layout import padded_vocab_size
from nemo_kto.errors import CheckpointError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_LAYER_NAME = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")


class Kind(Enum):
    """How a Megatron parameter is made of its Hugging Face tensors, and over which dimension TP shards it."""

    REPLICATED = "one tensor, whole on every rank"
    VOCAB = "one tensor, rows sharded, zero rows added up to a multiple of TP"
    ROW = "one tensor, columns sharded (the input of a row-parallel linear)"
    QKV = "q, k, v, rows sharded by query group; each group's q, k and v lie together"
    GATE_UP = "gate, up, rows sharded; a rank's gate lies above its up"


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter in terms of Hugging Face tensors."""

    kind: Kind
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of the unsharded Hugging Face tensors, in the order of ``names``."""
    layer: int | None = None
    """Decoder layer over all stages, from 0; None outside the decoder."""


_NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    # Transformer Engine holds a norm inside the linear layer that follows it.
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def rule_for(arch: Architecture, parameter: str) -> Rule:
    """The rule of one Megatron parameter.

    Args:
        arch: the network it belongs to.
        parameter: its name, counting layers over all stages. Local and Transformer Engine names are known.

    Raises:
        CheckpointError: no Hugging Face tensor corresponds to it.
    """
    match = _LAYER_NAME.match(parameter)
    if match is not None:
        return _layer_rule(arch, int(match[1]), match[2])
    vocab = ((arch.vocab_size, arch.hidden_size),)
    if parameter == "embedding.word_embeddings.weight":
        return Rule(Kind.VOCAB, (EMBEDDING,), vocab)
    if parameter == "output_layer.weight":
        return Rule(Kind.VOCAB, (EMBEDDING if arch.tied_embeddings else HEAD,), vocab)
    if parameter == "decoder.final_layernorm.weight":
        return Rule(Kind.REPLICATED, ("model.norm.weight",), ((arch.hidden_size,),))
    raise CheckpointError(f"{parameter}: no Hugging Face tensor corresponds to this parameter")


def rules(arch: Architecture) -> Iterator[Rule]:
    """Every tensor of the network exactly once, in the order of the forward pass."""
    yield rule_for(arch, "embedding.word_embeddings.weight")
    for layer in range(arch.num_layers):
        for suffix in _layer_parameters(arch):
            yield rule_for(arch, f"decoder.layers.{layer}.{suffix}")
    yield rule_for(arch, "decoder.final_layernorm.weight")
    if not arch.tied_embeddings:
        yield rule_for(arch, "output_layer.weight")


def shard_bounds(rule: Rule, index: int, tp_rank: int, tp_size: int) -> tuple[int, int, int] | None:
    """What a TP rank needs of the rule's ``index``-th tensor: (dimension, start, stop), or None for all of it.

    ``start == stop`` where a rank holds only vocabulary padding.
    """
    if rule.kind is Kind.REPLICATED:
        return None
    dim = 1 if rule.kind is Kind.ROW else 0
    size = rule.shapes[index][dim]
    width = padded_vocab_size(size, tp_size) // tp_size  # equals size / TP for everything but the vocabulary
    return dim, min(tp_rank * width, size), min((tp_rank + 1) * width, size)


def join(rule: Rule, arch: Architecture, parts: list[torch.Tensor], rows: int) -> torch.Tensor:
    """Make a rank's shard of a Megatron parameter.

    Args:
        rule: of the parameter.
        arch: the network.
        parts: the rank's shard of each Hugging Face tensor, cut by :func:`shard_bounds`.
        rows: of the shard to make; vocabulary shards are filled up to it with zeros.
    """
    if rule.kind is Kind.VOCAB:
        return F.pad(parts[0], (0, 0, 0, rows - parts[0].shape[0]))
    if rule.kind is Kind.GATE_UP:
        return torch.cat(parts)
    if rule.kind is Kind.QKV:
        groups = parts[1].shape[0] // arch.head_dim
        by_group = [part.unflatten(0, (groups, -1)) for part in parts]
        return torch.cat(by_group, dim=1).flatten(0, 1)
    return parts[0]


def split(rule: Rule, arch: Architecture, shard: torch.Tensor) -> list[torch.Tensor]:
    """The inverse of :func:`join`, but for the vocabulary's zero rows, which stay. Returns views."""
    if rule.kind is Kind.GATE_UP:
        return list(shard.chunk(2))
    if rule.kind is Kind.QKV:
        queries = arch.num_attention_heads // arch.num_query_groups
        by_group = shard.unflatten(0, (-1, (queries + 2) * arch.head_dim))
        parts = by_group.split([queries * arch.head_dim, arch.head_dim, arch.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]
    return [shard]


def assemble(rule: Rule, arch: Architecture, shards: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face tensors, contiguous and unpadded, from the shards of all TP ranks in order."""
    if rule.kind is Kind.REPLICATED:
        return {rule.names[0]: shards[0].contiguous()}
    dim = 1 if rule.kind is Kind.ROW else 0
    parts_by_rank = [split(rule, arch, shard) for shard in shards]
    whole = (torch.cat(parts, dim=dim) for parts in zip(*parts_by_rank, strict=True))
    # The narrow drops vocabulary padding; everywhere else it keeps everything.
    return {
        name: tensor.narrow(0, 0, shape[0]).contiguous()
        for name, shape, tensor in zip(rule.names, rule.shapes, whole, strict=True)
    }


def _layer_parameters(arch: Architecture) -> list[str]:
    names = ["input_layernorm.weight", "self_attention.linear_qkv.weight"]
    if arch.qkv_bias:
        names.append("self_attention.linear_qkv.bias")
    if arch.qk_norm:
        names += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
    names += ["self_attention.linear_proj.weight", "pre_mlp_layernorm.weight"]
    return [*names, "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]


def _layer_rule(arch: Architecture, layer: int, suffix: str) -> Rule:
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    query_rows, key_rows = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim

    def rule(kind: Kind, names: tuple[str, ...], *shapes: tuple[int, ...]) -> Rule:
        return Rule(kind, tuple(f"model.layers.{layer}.{name}" for name in names), shapes, layer)

    if suffix in _NORMS:
        per_head = suffix.startswith(("self_attention.q_", "self_attention.k_"))
        return rule(Kind.REPLICATED, (_NORMS[suffix],), (arch.head_dim if per_head else hidden,))
    if suffix == "self_attention.linear_qkv.weight":
        names = tuple(f"{name}.weight" for name in _QKV)
        return rule(Kind.QKV, names, (query_rows, hidden), (key_rows, hidden), (key_rows, hidden))
    if suffix == "self_attention.linear_qkv.bias":
        names = tuple(f"{name}.bias" for name in _QKV)
        return rule(Kind.QKV, names, (query_rows,), (key_rows,), (key_rows,))
    if suffix == "self_attention.linear_proj.weight":
        return rule(Kind.ROW, ("self_attn.o_proj.weight",), (hidden, query_rows))
    if suffix == "mlp.linear_fc1.weight":
        return rule(Kind.GATE_UP, ("mlp.gate_proj.weight", "mlp.up_proj.weight"), (ffn, hidden), (ffn, hidden))
    if suffix == "mlp.linear_fc2.weight":
        return rule(Kind.ROW, ("mlp.down_proj.weight",), (hidden, ffn))
    raise CheckpointError(f"decoder.layers.{layer}.{suffix}: no Hugging Face tensor corresponds to this parameter")
