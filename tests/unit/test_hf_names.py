"""The map between Megatron parameters and Hugging Face tensors, on plain tensors: no files, no ranks."""

from __future__ import annotations

import pytest
import torch

from nemo_kto.checkpoint import hf_names
from nemo_kto.checkpoint.hf_names import Kind
from nemo_kto.config.architecture import Architecture
from nemo_kto.config.layout import padded_vocab_size
from nemo_kto.errors import CheckpointError

ARCH = Architecture(
    family="qwen2",
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=3,
    vocab_size=5,
    max_position_embeddings=16,
    norm_epsilon=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    tied_embeddings=False,
    qkv_bias=True,
    qk_norm=True,
)


def full_tensors(rule):
    return [torch.randn(shape) for shape in rule.shapes]


def cut(tensor, bounds):
    return tensor if bounds is None else tensor.narrow(bounds[0], bounds[1], bounds[2] - bounds[1])


def shards_of(rule, tensors, tp_size):
    """What every TP rank's parameter holds, as loading makes it."""
    rows = padded_vocab_size(ARCH.vocab_size, tp_size) // tp_size
    return [
        hf_names.join(
            rule,
            ARCH,
            [cut(t, hf_names.shard_bounds(rule, i, rank, tp_size)) for i, t in enumerate(tensors)],
            rows=rows,
        )
        for rank in range(tp_size)
    ]


@pytest.mark.parametrize("tp_size", [1, 2, 4])  # vocabulary 5 at TP 4: the last rank holds padding only
def test_cutting_and_assembling_every_tensor_loses_nothing(tp_size):
    torch.manual_seed(0)
    for rule in hf_names.rules(ARCH):
        tensors = full_tensors(rule)
        back = hf_names.assemble(rule, ARCH, shards_of(rule, tensors, tp_size))
        assert list(back) == list(rule.names)
        for name, tensor in zip(rule.names, tensors, strict=True):
            assert torch.equal(back[name], tensor), name
            assert back[name].is_contiguous()


def test_qkv_lies_group_by_group():
    """Megatron's order: the queries of group 0, its key, its value, the queries of group 1, ..."""
    rule = hf_names.rule_for(ARCH, "decoder.layers.1.self_attention.linear_qkv.weight")
    q, k, v = full_tensors(rule)
    (whole,) = shards_of(rule, [q, k, v], 1)
    d = ARCH.head_dim
    expected = [part for g in range(4) for part in (q[2 * g * d : 2 * (g + 1) * d], k[g * d :][:d], v[g * d :][:d])]
    assert torch.equal(whole, torch.cat(expected))
    assert torch.equal(torch.cat(shards_of(rule, [q, k, v], 2)), whole)  # so that TP cuts between groups


def test_gate_lies_above_up_on_every_rank():
    rule = hf_names.rule_for(ARCH, "decoder.layers.0.mlp.linear_fc1.weight")
    gate, up = full_tensors(rule)
    first, second = shards_of(rule, [gate, up], 2)
    assert torch.equal(first, torch.cat([gate[:6], up[:6]]))
    assert torch.equal(second, torch.cat([gate[6:], up[6:]]))


def test_vocabulary_padding_is_zero():
    rule = hf_names.rule_for(ARCH, "embedding.word_embeddings.weight")
    shards = shards_of(rule, full_tensors(rule), 4)
    assert [tuple(shard.shape) for shard in shards] == [(2, 8)] * 4
    assert not torch.cat(shards)[5:].any()


def test_every_tensor_has_one_rule():
    names = [name for rule in hf_names.rules(ARCH) for name in rule.names]
    assert len(names) == len(set(names))
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(names)
    assert sum(name.startswith("model.layers.1.") for name in names) == 14


def test_transformer_engine_names_mean_the_same():
    for local, engine in (
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ):
        rules = [hf_names.rule_for(ARCH, f"decoder.layers.0.{name}") for name in (local, engine)]
        assert rules[0] == rules[1]
        assert rules[0].kind is Kind.REPLICATED


def test_unknown_parameters_are_named():
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.0\.adapter\.weight"):
        hf_names.rule_for(ARCH, "decoder.layers.0.adapter.weight")
