"""NeMo 1.x's ``model_config.yaml`` of a Megatron GPT and our architecture, both ways. Plain data: nothing is imported.

A ``target`` is a string like any other, ``${...}`` is never resolved, and a value that cannot be honoured is refused
by key, because a model that is read wrongly still trains, on something else.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import yaml

from nemo_kto.config.architecture import Architecture, RopeScaling
from nemo_kto.errors import CheckpointError

FILE = "model_config.yaml"
_MAX_BYTES = 1 << 22
_TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
_GATED = ("swiglu", "fast-swiglu")
_LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)  # the only frequencies behind scale_positional_embedding
_REQUIRED = {
    "mcore_gpt": (True, "only Megatron-Core models are read; convert it with NeMo's own script for mcore"),
    "bias": (False, "biases in the linear layers are not supported"),
    "normalization": ("rmsnorm", "only rmsnorm is supported"),
    "position_embedding_type": ("rope", "only rope is supported"),
    "rotary_percentage": (1.0, "RoPE must cover the whole head"),
}
"""What these keys must be; where one is absent, NeMo takes it for something else, but for the last."""
_ALLOWED = {
    "num_moe_experts": (None, 0, 1),
    "transformer_block_type": (None, "pre_ln"),
    "headscale": (None, False),
    "layernorm_zero_centered_gamma": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "use_emha": (None, False),
    "multi_latent_attention": (None, False),
}
"""What these keys may be."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of an archive, as plain values.

    Raises:
        CheckpointError: no such file, no yaml of plain values, or no mapping.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} has more than {_MAX_BYTES} bytes: it is no {FILE}")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: this is no .nemo archive of a language model") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {reason}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, not settings by name")
    return values


def to_architecture(values: dict[str, Any], vocab_size: int, where: str | Path) -> Architecture:
    """The network that the settings describe.

    Args:
        values: from :func:`read_yaml`.
        vocab_size: true vocabulary: entries of the tokenizer, without the padding of the embedding.
        where: what messages call the file.

    Raises:
        CheckpointError: a key is missing, not a plain value, or describes what is not supported.
    """
    config = _Settings(values, where)
    _refuse_unsupported(config)
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    groups = heads if config.get("num_query_groups") is None else config.size("num_query_groups")
    if heads % groups:
        config.fail("num_query_groups", f"{heads} attention heads do not share {groups} groups evenly")
    if config.get("kv_channels") is None and hidden % heads:
        config.fail("kv_channels", f"must be given: hidden_size {hidden} is not a multiple of {heads} heads")
    positions = "encoder_seq_length" if config.get("max_position_embeddings") is None else "max_position_embeddings"
    window = _window(config)
    qkv_bias, qk_norm = config.flag("qkv_bias", default=False), config.flag("qk_layernorm", default=False)
    return Architecture(
        family=_family(config, qkv_bias=qkv_bias, qk_norm=qk_norm, window=window),
        num_layers=config.size("num_layers"),
        hidden_size=hidden,
        ffn_hidden_size=config.size("ffn_hidden_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads if config.get("kv_channels") is None else config.size("kv_channels"),
        vocab_size=vocab_size,
        max_position_embeddings=config.size(positions),
        norm_epsilon=config.number("layernorm_epsilon", 1e-5),
        rope_theta=config.number("rotary_base", 10000.0),
        rope_scaling=_rope_scaling(config),
        tied_embeddings=config.flag("share_embeddings_and_output_weights", default=True),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        sliding_window=window,
        full_attention_layers=config.get("full_attention_layers") or 0,
    )


def to_yaml(arch: Architecture, *, precision: str, tensor_parallel: int) -> str:
    """The settings of an archive that holds ``arch``: the inverse of :func:`to_architecture`.

    NeMo has no words for every RoPE scaling, nor for layers without a window; these go into keys of our own.

    Args:
        arch: the network.
        precision: of the weights, ``bf16`` or ``32``.
        tensor_parallel: that the embedding was padded for.
    """
    values: dict[str, Any] = {
        "target": _TARGET,
        "mcore_gpt": True,
        "transformer_engine": True,
        "precision": precision,
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": 1,
        "encoder_seq_length": arch.max_position_embeddings,
        "max_position_embeddings": arch.max_position_embeddings,
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "bias": False,
        "qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "activation": "fast-swiglu",
        "normalization": "rmsnorm",
        "layernorm_epsilon": arch.norm_epsilon,
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "rotary_base": arch.rope_theta,
        "share_embeddings_and_output_weights": arch.tied_embeddings,
        "make_vocab_size_divisible_by": 1,
        "override_vocab_size": arch.vocab_size,
        "tokenizer": {"library": "huggingface", "type": "nemo:hf", "use_fast": True},
        "hf_model_type": arch.family,
    }
    if arch.sliding_window is not None:
        values |= {"window_size": [arch.sliding_window, 0], "full_attention_layers": arch.full_attention_layers}
    scaling = arch.rope_scaling
    if scaling == _LLAMA3:
        values["scale_positional_embedding"] = True
    elif scaling is not None and scaling.kind == "linear":
        values["seq_len_interpolation_factor"] = scaling.factor
    elif scaling is not None:
        values["rope_scaling"] = asdict(scaling)
    return yaml.safe_dump(values, sort_keys=False)


class _Settings:
    """Values whose reads fail with the file's and the key's name."""

    def __init__(self, values: dict[str, Any], where: str | Path) -> None:
        self._values, self._where = values, where

    def get(self, key: str) -> Any:
        value = self._values.get(key)
        if isinstance(value, str) and "${" in value:
            self.fail(key, f"{value!r} is an interpolation, which is never resolved: write the value itself")
        return value

    def fail(self, key: str, why: str) -> NoReturn:
        raise CheckpointError(f"{self._where}: {key}: {why}")

    def size(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(key, f"expected a positive integer, found {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = default if self.get(key) is None else self.get(key)
        if isinstance(value, str):
            with suppress(ValueError):  # yaml takes 1e-05 for a word
                value = float(value)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            self.fail(key, f"expected a positive number, found {value!r}")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, bool):
            self.fail(key, f"expected true or false, found {value!r}")
        return value


def _refuse_unsupported(config: _Settings) -> None:
    for key, (wanted, why) in _REQUIRED.items():
        value = config.get(key)
        if key == "rotary_percentage" and value is None:
            continue
        if (value.lower() if isinstance(value, str) else value) != wanted:
            config.fail(key, f"{value!r}: {why}")
    for key, allowed in _ALLOWED.items():
        if config.get(key) not in allowed:
            config.fail(key, f"{config.get(key)!r} is not supported")
    if config.get("activation") not in _GATED:
        config.fail("activation", f"{config.get('activation')!r} is not supported, only {' and '.join(_GATED)}")


def _family(config: _Settings, *, qkv_bias: bool, qk_norm: bool, window: int | None) -> str:
    """The Hugging Face family: the one our own archives name, or the one whose network this is."""
    if qkv_bias and qk_norm:
        config.fail("qk_layernorm", "is not supported together with qkv_bias")
    named = config.get("hf_model_type")
    fits = ("qwen2",) if qkv_bias else ("qwen3",) if qk_norm else ("mistral",) if window else ("llama", "mistral")
    if named is not None and named not in fits:
        config.fail(
            "hf_model_type", f"{named!r} has another network than these settings, which fit {' or '.join(fits)}"
        )
    return str(named or fits[0])


def _window(config: _Settings) -> int | None:
    """``[tokens, 0]``: attention to so many tokens before, and to none after."""
    window = config.get("window_size")
    if window is None or window == [-1, 0] or window == [-1, -1]:
        return None
    if not isinstance(window, list) or len(window) != 2 or window[1] != 0 or not isinstance(window[0], int):
        config.fail("window_size", f"expected [tokens, 0], found {window!r}")
    if window[0] < 1:
        config.fail("window_size", f"expected [tokens, 0], found {window!r}")
    return int(window[0])


def _rope_scaling(config: _Settings) -> RopeScaling | None:
    given = [
        key
        for key in ("scale_positional_embedding", "seq_len_interpolation_factor", "rope_scaling")
        if config.get(key)
    ]
    if len(given) > 1:
        config.fail(given[0], f"is not supported together with {given[1]}")
    if given == ["scale_positional_embedding"]:
        return _LLAMA3
    if given == ["seq_len_interpolation_factor"]:
        return RopeScaling("linear", config.number(given[0], 1.0))
    if given:
        return _own_scaling(config)
    return None


def _own_scaling(config: _Settings) -> RopeScaling:
    values = config.get("rope_scaling")
    if not isinstance(values, dict) or values.get("kind") != "llama3" or values.keys() != asdict(_LLAMA3).keys():
        config.fail("rope_scaling", f"{values!r} is not supported")
    inner = _Settings(values, "rope_scaling")
    numbers = [inner.number(key, 0.0) for key in ("factor", "low_freq_factor", "high_freq_factor")]
    return RopeScaling("llama3", *numbers, inner.size("original_max_position_embeddings"))
