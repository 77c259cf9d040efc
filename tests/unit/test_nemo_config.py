"""NeMo 1.x's model_config.yaml: what it says is read exactly, what it cannot mean here is refused by key."""

from __future__ import annotations

import dataclasses
import os

import pytest
import yaml

from nemo_kto.checkpoint.nemo_config import read_yaml, to_architecture, to_yaml
from nemo_kto.config.architecture import Architecture, RopeScaling
from nemo_kto.errors import CheckpointError

LLAMA = Architecture("llama", 4, 64, 128, 4, 2, 16, 399, 256, 1e-5, 5e5, None, False, False, False)
GIVEN = {
    # as NeMo's converter of Llama checkpoints writes it, shortened
    "mcore_gpt": True,
    "micro_batch_size": 4,
    "tensor_model_parallel_size": 2,
    "encoder_seq_length": 4096,
    "max_position_embeddings": 4096,
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "init_method_std": 0.02,
    "hidden_dropout": 0.0,
    "kv_channels": None,
    "normalization": "rmsnorm",
    "layernorm_epsilon": 1e-05,
    "make_vocab_size_divisible_by": 128,
    "bias": False,
    "activation": "fast-swiglu",
    "transformer_block_type": "pre_ln",
    "position_embedding_type": "rope",
    "rotary_percentage": 1.0,
    "num_query_groups": 8,
    "rotary_base": 500000.0,
    "share_embeddings_and_output_weights": False,
    "tokenizer": {"library": "sentencepiece", "model": "nemo:0123abcd_tokenizer.model"},
    "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
}


def read(tmp_path, text: str):
    (tmp_path / "model_config.yaml").write_text(text)
    return read_yaml(tmp_path / "model_config.yaml")


def test_a_nemo_config_is_read(tmp_path):
    assert to_architecture(read(tmp_path, yaml.safe_dump(GIVEN)), 128256, "x") == Architecture(
        "llama", 32, 4096, 14336, 32, 8, 128, 128256, 4096, 1e-5, 500000.0, None, False, False, False
    )


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"kv_channels": 256}, "head_dim", 256),
        ({"num_query_groups": None}, "num_query_groups", 32),
        ({"max_position_embeddings": None, "encoder_seq_length": 512}, "max_position_embeddings", 512),
        ({"layernorm_epsilon": "1e-06"}, "norm_epsilon", 1e-6),
        ({"rotary_base": 10000}, "rope_theta", 10000.0),
        ({"share_embeddings_and_output_weights": True}, "tied_embeddings", True),
        ({"share_embeddings_and_output_weights": None}, "tied_embeddings", True),
        ({"qkv_bias": True}, "family", "qwen2"),
        ({"qkv_bias": True}, "qkv_bias", True),
        ({"qk_layernorm": True}, "family", "qwen3"),
        ({"window_size": [4096, 0]}, "sliding_window", 4096),
        ({"window_size": [4096, 0]}, "family", "mistral"),
        ({"window_size": [-1, 0]}, "sliding_window", None),
        ({"seq_len_interpolation_factor": 4}, "rope_scaling", RopeScaling("linear", 4.0)),
        ({"scale_positional_embedding": True}, "rope_scaling", RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
        ({"activation": "swiglu"}, "family", "llama"),
        ({"normalization": "RMSNorm", "rotary_percentage": None}, "family", "llama"),
    ],
)
def test_each_key_reaches_the_architecture(change, field, value):
    assert getattr(to_architecture({**GIVEN, **change}, 128256, "x"), field) == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mcore_gpt": False}, "mcore_gpt: False: only Megatron-Core models"),
        ({"mcore_gpt": None}, "mcore_gpt: None: only"),
        ({"bias": True}, "bias: True: biases"),
        ({"bias": None}, "bias: None: biases"),
        ({"normalization": "layernorm1p"}, "normalization: 'layernorm1p': only rmsnorm"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type: 'learned_absolute': only rope"),
        ({"rotary_percentage": 0.5}, "rotary_percentage: 0.5: RoPE must cover"),
        ({"activation": "gelu"}, "activation: 'gelu' is not supported, only swiglu and fast-swiglu"),
        ({"activation": "fast-geglu"}, "activation: 'fast-geglu' is not supported"),
        ({"num_moe_experts": 8}, "num_moe_experts: 8 is not supported"),
        ({"transformer_block_type": "post_ln"}, "transformer_block_type: 'post_ln' is not"),
        ({"headscale": True}, "headscale: True is not"),
        ({"num_layers": 0}, "num_layers: expected a positive integer, found 0"),
        ({"hidden_size": "4096"}, "hidden_size: expected a positive integer, found '4096'"),
        (
            {"num_layers": "${oc.env:HOME}"},
            "num_layers: '${oc.env:HOME}' is an interpolation, which is never resolved",
        ),
        ({"max_position_embeddings": "${.encoder_seq_length}"}, "max_position_embeddings: '${.enc"),
        ({"rotary_base": "${run:touch}"}, "rotary_base: '${run:touch}' is an interpolation"),
        ({"activation": "${a}"}, "activation: '${a}' is an interpolation"),
        ({"rotary_base": -1}, "rotary_base: expected a positive number, found -1"),
        ({"layernorm_epsilon": "tiny"}, "layernorm_epsilon: expected a positive number, found 'tiny'"),
        ({"layernorm_epsilon": float("nan")}, "layernorm_epsilon: expected a positive number"),
        ({"qkv_bias": 1}, "qkv_bias: expected true or false, found 1"),
        ({"num_query_groups": 5}, "num_query_groups: 32 attention heads do not share 5 groups evenly"),
        ({"hidden_size": 4100}, "kv_channels: must be given: hidden_size 4100"),
        ({"qkv_bias": True, "qk_layernorm": True}, "qk_layernorm: is not supported together with qkv_bias"),
        ({"window_size": [16, 16]}, "window_size: expected [tokens, 0]"),
        ({"window_size": [0, 0]}, "window_size: expected [tokens, 0]"),
        (
            {"scale_positional_embedding": True, "seq_len_interpolation_factor": 2},
            "scale_positional_embedding: is not supported together with seq_len_interpolation_factor",
        ),
        ({"rope_scaling": {"kind": "yarn"}}, "rope_scaling: {'kind': 'yarn'} is not supported"),
        ({"hf_model_type": "qwen2"}, "hf_model_type: 'qwen2' has another network than these settings"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_key(change, message):
    with pytest.raises(CheckpointError) as refused:
        to_architecture({**GIVEN, **change}, 128256, "a.nemo/model_config.yaml")
    assert f"a.nemo/model_config.yaml: {message}" in str(refused.value)


@pytest.mark.parametrize("key", ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "activation"])
def test_a_missing_key_is_named(key):
    with pytest.raises(CheckpointError, match=f"{key}: .*None"):
        to_architecture({name: value for name, value in GIVEN.items() if name != key}, 128256, "x")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"family": "mistral"},
        {"family": "mistral", "sliding_window": 128},
        {"family": "qwen2", "qkv_bias": True, "tied_embeddings": True},
        {"family": "qwen2", "qkv_bias": True, "sliding_window": 64, "full_attention_layers": 3},
        {"family": "qwen3", "qk_norm": True, "head_dim": 32},
        {"rope_scaling": RopeScaling("linear", 3.0)},
        {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)},
        {"rope_scaling": RopeScaling("llama3", 4.0, 1.5, 3.0, 64)},
    ],
)
def test_there_and_back(change, tmp_path):
    arch = dataclasses.replace(LLAMA, **change)
    values = read(tmp_path, to_yaml(arch, precision="bf16", tensor_parallel=2))
    assert to_architecture(values, arch.vocab_size, "x") == arch


# --- hostility


def test_code_in_yaml_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    for tag in (
        f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]",
        f"!!python/object/apply:os.system ['touch {mark}']",
        f'!!python/object/new:os.system ["touch {mark}"]',
    ):
        with pytest.raises(CheckpointError, match=r"model_config\.yaml cannot be read: ConstructorError"):
            read(tmp_path, f"mcore_gpt: {tag}\n")
    assert not mark.exists()


def test_targets_are_not_imported_and_resolvers_not_run(tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    (tmp_path / "hostile_target.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(os.environ, "NEMO_SECRET", "seen")
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("hostile", lambda: mark.touch(), replace=True)
    hostile = {
        "target": "hostile_target.Model",
        "_target_": "hostile_target.Model",
        "optim": {"_target_": "hostile_target.Adam", "lr": "${hostile:}", "name": "${oc.env:NEMO_SECRET}"},
    }
    values = read(tmp_path, yaml.safe_dump({**GIVEN, **hostile}))
    assert to_architecture(values, 128256, "x").num_layers == 32
    assert values["optim"]["name"] == "${oc.env:NEMO_SECRET}"
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "cannot be read: ParserError"),
        ("just words", "holds str, not settings by name"),
        ("", "holds NoneType"),
        ("a: 2020-13-45", "cannot be read: ValueError"),
        ("[" * 5000, "cannot be read: "),
        ("? [a]\n: b", "cannot be read: ConstructorError"),
        ("a: \x00", "cannot be read: ReaderError"),
    ],
)
def test_what_is_no_config_is_refused(text, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, text)


def test_a_missing_or_huge_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is missing: this is no \.nemo archive of a language model"):
        read_yaml(tmp_path / "model_config.yaml")
    with pytest.raises(CheckpointError, match="more than 4194304 bytes"):
        read(tmp_path, "a" * (1 << 23))
