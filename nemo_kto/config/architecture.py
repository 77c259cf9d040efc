"""What a decoder looks like, as plain numbers read from a Hugging Face ``config.json``. No model is built here.

Standard library only: it runs before any heavy import. What a configuration can say and we cannot do is refused by
key, because a model that is read wrongly still trains, on something else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from nemo_kto.errors import CheckpointError

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Supported Hugging Face ``model_type`` and the class that goes with it."""
_DEFAULT_ROPE_THETA = 10000.0
_MISTRAL_DEFAULT_WINDOW = 4096  # MistralConfig's default: an absent key is a window, only null is full attention
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


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
    full_attention_layers: int = 0
    """First layers that ignore ``sliding_window`` (Qwen's ``max_window_layers``)."""


def read_architecture(hf_dir: str | Path) -> Architecture:
    """Read the architecture of a Hugging Face model directory.

    Args:
        hf_dir: directory with a ``config.json`` as written by transformers 4 or 5.

    Returns:
        The architecture, complete: nothing in it is a guess.

    Raises:
        CheckpointError: no such directory or file, broken JSON, a missing key, or a feature that is not supported.
    """
    config = _Config(Path(hf_dir) / "config.json")
    family = _family(config)
    _refuse_unsupported(config, family)
    heads = config.size("num_attention_heads")
    groups = heads if family == "llama" and config.get("num_key_value_heads") is None else None
    groups = groups or config.size("num_key_value_heads")
    if heads % groups:
        config.fail("num_key_value_heads", f"{heads} attention heads do not share {groups} key/value heads evenly")
    theta, scaling = _rope(config)
    window, full_layers = _window(config, family)
    return Architecture(
        family=family,
        num_layers=config.size("num_hidden_layers"),
        hidden_size=config.size("hidden_size"),
        ffn_hidden_size=config.size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=_head_dim(config, family, heads),
        vocab_size=config.size("vocab_size"),
        max_position_embeddings=config.size("max_position_embeddings"),
        norm_epsilon=config.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=window,
        full_attention_layers=full_layers,
    )


def stored_dtype(hf_dir: str | Path) -> str | None:
    """The dtype that ``config.json`` says its weights have, such as ``bfloat16``; None if it does not say.

    Raises:
        CheckpointError: no such directory or file, or broken JSON.
    """
    config = _Config(Path(hf_dir) / "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return None if dtype is None else str(dtype)


def to_hf_config(arch: Architecture, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of an architecture: the inverse of :func:`read_architecture`.

    For exports that have no source ``config.json`` to start from. Uses the keys of transformers 4, which 5 reads too.

    Args:
        arch: what to describe.
        dtype: of the stored weights, such as ``bfloat16``.
    """
    rope = None if arch.rope_scaling is None else _rope_keys(arch.rope_scaling)
    config: dict[str, Any] = {
        "architectures": [FAMILIES[arch.family]],
        "model_type": arch.family,
        "num_hidden_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position_embeddings,
        "rms_norm_eps": arch.norm_epsilon,
        "rope_theta": arch.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": arch.tied_embeddings,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if arch.family != "llama":
        config["sliding_window"] = arch.sliding_window
    if arch.family.startswith("qwen"):
        config["use_sliding_window"] = arch.sliding_window is not None
        config["max_window_layers"] = arch.full_attention_layers
    return config


class _Config:
    """A ``config.json`` whose reads fail with the file's and the key's name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(
                f"{path}: not found. Give a Hugging Face model directory: one with config.json and *.safetensors"
            )
        try:
            self.values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(self.values, dict):
            raise CheckpointError(f"{path}: holds {type(self.values).__name__}, not an object")

    def get(self, key: str) -> Any:
        """The value of an optional key; None if it is absent or null."""
        return self.values.get(key)

    def fail(self, key: str, why: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {key}: {why}")

    def size(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(key, f"expected a positive integer, found {value!r}")
        return value

    def number(self, key: str) -> float:
        return self.positive(key, self.get(key))

    def positive(self, key: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            self.fail(key, f"expected a positive number, found {value!r}")
        return float(value)


def _family(config: _Config) -> str:
    family, named = config.get("model_type"), config.get("architectures")
    supported = ", ".join(FAMILIES.values())
    if family not in FAMILIES:
        config.fail("model_type", f"{family!r} ({named}) is not supported; supported are {supported}")
    if named is not None and named != [FAMILIES[family]]:
        config.fail("architectures", f"{named} is not supported for {family}; supported are {supported}")
    return str(family)


def _refuse_unsupported(config: _Config, family: str) -> None:
    for key in _EXPERT_KEYS:
        if config.get(key):
            config.fail(key, "mixture-of-experts models are not supported")
    if config.get("quantization_config") is not None:
        config.fail("quantization_config", "quantized weights cannot be trained; use the unquantized model")
    if config.get("hidden_act") not in (None, "silu"):
        config.fail("hidden_act", f"{config.get('hidden_act')!r} is not supported, only silu")
    if config.get("mlp_bias"):
        config.fail("mlp_bias", "biases in the feed-forward layers are not supported")
    if config.get("attention_bias") and family != "qwen2":  # Qwen2 ignores the key: q, k, v have a bias, o has none
        config.fail("attention_bias", "a bias on the attention output projection is not supported")


def _head_dim(config: _Config, family: str, heads: int) -> int:
    if config.get("head_dim") is not None or family == "qwen3":
        return config.size("head_dim")  # Qwen3's default does not follow from the other sizes, so it must be there
    hidden = config.size("hidden_size")
    if hidden % heads:
        config.fail("hidden_size", f"{hidden} is not a multiple of {heads} attention heads, and head_dim is not given")
    return hidden // heads


def _rope(config: _Config) -> tuple[float, RopeScaling | None]:
    """RoPE base and scaling, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4)."""
    key = "rope_scaling" if config.get("rope_parameters") is None else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        config.fail(key, "RoPE that differs from layer to layer is not supported")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    theta = _DEFAULT_ROPE_THETA if theta is None else config.positive("rope_theta", theta)
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        config.fail("partial_rotary_factor", f"{partial} is not supported: RoPE must cover the whole head")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", config.positive(f"{key}.factor", rope.get("factor")))
    if kind == "llama3":
        return theta, _llama3_scaling(config, key, rope)
    config.fail(f"{key}.rope_type", f"{kind!r} is not supported; supported are default, linear, llama3")


def _llama3_scaling(config: _Config, key: str, rope: dict[str, Any]) -> RopeScaling:
    original = rope.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    factor, low, high, original = (
        config.positive(f"{key}.{name}", value)
        for name, value in (
            ("factor", rope.get("factor")),
            ("low_freq_factor", rope.get("low_freq_factor")),
            ("high_freq_factor", rope.get("high_freq_factor")),
            ("original_max_position_embeddings", original),
        )
    )
    if high <= low:
        config.fail(f"{key}.high_freq_factor", f"{high} must exceed low_freq_factor {low}")
    return RopeScaling("llama3", factor, low, high, int(original))


def _rope_keys(scaling: RopeScaling) -> dict[str, Any]:
    keys: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        keys |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return keys


def _window(config: _Config, family: str) -> tuple[int | None, int]:
    """Attention window in tokens, and the number of first layers it does not apply to."""
    if family == "mistral":
        if "sliding_window" not in config.values:
            return _MISTRAL_DEFAULT_WINDOW, 0
        return (None if config.get("sliding_window") is None else config.size("sliding_window")), 0
    if family == "llama" or not config.get("use_sliding_window"):
        return None, 0
    full_layers = config.get("max_window_layers")
    if not isinstance(full_layers, int) or full_layers < 0:
        config.fail("max_window_layers", f"expected a number of layers, found {full_layers!r}")
    return config.size("sliding_window"), full_layers
