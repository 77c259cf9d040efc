"""Reading config.json: what is understood, what is refused by name, and which layouts fit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from nemo_kto.config.architecture import Architecture, RopeScaling, read_architecture, stored_dtype, to_hf_config
from nemo_kto.config.layout import check_layout, padded_vocab_size
from nemo_kto.errors import CheckpointError, ConfigError

SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
LLAMA31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN3 = {
    **SMOLLM2_135M,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
QWEN2 = {**QWEN3, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None}
MISTRAL = {**SMOLLM2_135M, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder, config):
    return read_architecture(write(folder, config))


def test_smollm2_is_read_in_full(tmp_path):
    assert read(tmp_path, SMOLLM2_135M) == Architecture(
        family="llama",
        num_layers=30,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_query_groups=3,
        head_dim=64,
        vocab_size=49152,
        max_position_embeddings=8192,
        norm_epsilon=1e-5,
        rope_theta=100000.0,
        rope_scaling=None,
        tied_embeddings=True,
        qkv_bias=False,
        qk_norm=False,
    )
    assert stored_dtype(tmp_path) == "bfloat16"


def test_rope_of_transformers_4_and_5_is_the_same(tmp_path):
    old = read(tmp_path, {**SMOLLM2_135M, "rope_theta": 500000.0, "rope_scaling": LLAMA31_ROPE})
    v5 = {key: value for key, value in SMOLLM2_135M.items() if not key.startswith("rope_")}
    new = read(tmp_path, {**v5, "rope_parameters": {"rope_theta": 500000.0, **LLAMA31_ROPE}})
    assert old == new
    assert new.rope_theta == 500000.0
    assert new.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def test_llama2_defaults(tmp_path):
    """Llama 2's config has neither rope_theta nor num_key_value_heads nor tie_word_embeddings."""
    absent = ("rope_theta", "rope_scaling", "num_key_value_heads", "tie_word_embeddings", "mlp_bias")
    arch = read(tmp_path, {key: value for key, value in SMOLLM2_135M.items() if key not in absent})
    assert (arch.rope_theta, arch.num_query_groups, arch.tied_embeddings) == (10000.0, 9, False)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (QWEN2, {"qkv_bias": True, "qk_norm": False, "head_dim": 64, "sliding_window": None}),
        (QWEN3, {"qkv_bias": False, "qk_norm": True, "head_dim": 128, "sliding_window": None}),
        ({**QWEN2, "sliding_window": 4096}, {"sliding_window": None}),  # use_sliding_window is false
        (
            {**QWEN2, "sliding_window": 4096, "use_sliding_window": True},
            {"sliding_window": 4096, "full_attention_layers": 28},
        ),
        (MISTRAL, {"sliding_window": None, "qkv_bias": False}),
        ({**MISTRAL, "sliding_window": 4096}, {"sliding_window": 4096}),
        ({key: value for key, value in MISTRAL.items() if key != "sliding_window"}, {"sliding_window": 4096}),
        (
            {**SMOLLM2_135M, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_scaling": RopeScaling("linear", 2)},
        ),
        ({**SMOLLM2_135M, "rope_scaling": {"rope_type": "default"}}, {"rope_scaling": None}),
        (
            {**SMOLLM2_135M, "rope_scaling": {**LLAMA31_ROPE, "original_max_position_embeddings": 4096}},
            {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 4096)},
        ),
    ],
)
def test_what_families_differ_in(tmp_path, config, expected):
    arch = read(tmp_path, config)
    assert {key: getattr(arch, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("change", "key", "why"),
    [
        ({"model_type": "gpt2"}, "model_type", "'gpt2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures", "not supported for llama"),
        ({"num_local_experts": 8}, "num_local_experts", "mixture-of-experts"),
        ({"num_experts": 128}, "num_experts", "mixture-of-experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config", "unquantized"),
        ({"hidden_act": "gelu"}, "hidden_act", "'gelu'"),
        ({"mlp_bias": True}, "mlp_bias", "not supported"),
        ({"attention_bias": True}, "attention_bias", "output projection"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type", "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.rope_type", "'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor", "found None"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters", "layer to layer"),
        ({"rope_scaling": {**LLAMA31_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor", "exceed"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
        ({"hidden_size": 577}, "hidden_size", "9 attention heads"),
        ({"num_key_value_heads": 2}, "num_key_value_heads", "9 attention heads"),
        ({"vocab_size": None}, "vocab_size", "positive integer"),
        ({"num_hidden_layers": "30"}, "num_hidden_layers", "'30'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps", "positive number"),
    ],
)
def test_refusals_name_file_and_key(tmp_path, change, key, why):
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, {**SMOLLM2_135M, **change})
    message = str(error.value)
    assert message.startswith(str(tmp_path / "config.json"))
    assert key in message
    assert why in message


def test_qwen3_must_say_its_head_dim(tmp_path):
    with pytest.raises(CheckpointError, match="head_dim"):
        read(tmp_path, {**QWEN3, "head_dim": None})


def test_files_that_are_not_there_or_not_json(tmp_path):
    with pytest.raises(CheckpointError, match=r"not found\. Give a Hugging Face model directory"):
        read_architecture(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds list"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        SMOLLM2_135M,
        {**SMOLLM2_135M, "rope_scaling": LLAMA31_ROPE},
        {**SMOLLM2_135M, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {**MISTRAL, "sliding_window": 4096},
        MISTRAL,
        {**QWEN2, "sliding_window": 512, "use_sliding_window": True},
        QWEN3,
    ],
)
def test_written_config_reads_back(tmp_path, config):
    arch = read(tmp_path, config)
    assert read(tmp_path, to_hf_config(arch, "float32")) == arch
    assert stored_dtype(tmp_path) == "float32"


def test_reading_imports_nothing_heavy():
    """It answers before torch is imported, so that a wrong path costs no waiting."""
    code = "import sys, nemo_kto.config.architecture, nemo_kto.config.layout; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def arch_of(tmp_path, **changes):
    return dataclasses.replace(read(tmp_path, SMOLLM2_135M), **changes)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "message"),
    [
        (2, 1, r"9 attention heads % 2 = 1; 3 key/value heads % 2 = 1\. Sizes that do: 1, 3"),
        (9, 1, r"3 key/value heads % 9 = 3; 1536 feed-forward columns \(intermediate_size\) % 9 = 6"),
        (
            1,
            4,
            r"pipeline_model_parallel_size=4 does not divide .* 30 layers % 4 = 2\. Sizes that do: 1, 2, 3",
        ),
        (0, 1, r"tensor_model_parallel_size is 0"),
    ],
)
def test_layouts_that_do_not_divide(tmp_path, tensor, pipeline, message):
    with pytest.raises(ConfigError, match=message):
        check_layout(arch_of(tmp_path), tensor_parallel=tensor, pipeline_parallel=pipeline)


def test_layouts_that_divide(tmp_path):
    """The vocabulary is padded, so it stands in no one's way."""
    check_layout(arch_of(tmp_path, vocab_size=49151), tensor_parallel=3, pipeline_parallel=5)
    assert padded_vocab_size(49151, 3) == 49152
    assert padded_vocab_size(8, 4) == 8
