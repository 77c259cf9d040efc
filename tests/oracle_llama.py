"""The oracle's network: Llama in float64 on one sequence, from a Hugging Face directory. See ``oracle.py``."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass
class Llama:
    """Config and float64 weights under their Hugging Face names. A tied head is the embedding itself."""

    config: dict
    weights: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> Llama:
        from safetensors.torch import load_file

        config = json.loads((Path(folder) / "config.json").read_text())
        assert config["model_type"] == "llama", config["model_type"]
        weights: dict[str, Tensor] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            weights.update({name: w.double() for name, w in load_file(file).items() if "rotary" not in name})
        if config.get("tie_word_embeddings"):
            weights.pop("lm_head.weight", None)
        return cls(config, weights)

    def copy(self) -> Llama:
        return copy.deepcopy(self)

    def logits(self, ids: list[int]) -> Tensor:
        """[S, V] float64 logits of one sequence."""
        c, w = self.config, self.weights
        x = w["model.embed_tokens.weight"][torch.tensor(ids)]
        cos, sin = _rope_table(c, len(ids))
        for layer in range(c["num_hidden_layers"]):
            p = f"model.layers.{layer}."
            x = x + self._attention(_rms_norm(x, w[p + "input_layernorm.weight"], c["rms_norm_eps"]), p, cos, sin)
            x = x + self._mlp(_rms_norm(x, w[p + "post_attention_layernorm.weight"], c["rms_norm_eps"]), p + "mlp.")
        x = _rms_norm(x, w["model.norm.weight"], c["rms_norm_eps"])
        head = w["model.embed_tokens.weight"] if c.get("tie_word_embeddings") else w["lm_head.weight"]
        return x @ head.T

    def _attention(self, x: Tensor, prefix: str, cos: Tensor, sin: Tensor) -> Tensor:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        length = x.shape[0]

        def project(name: str, count: int) -> Tensor:
            weight = self.weights[f"{prefix}self_attn.{name}.weight"]
            return (x @ weight.T).view(length, count, -1).transpose(0, 1)  # [count, S, D]

        query = _rotate(project("q_proj", heads), cos, sin)
        key = _rotate(project("k_proj", kv_heads), cos, sin).repeat_interleave(heads // kv_heads, dim=0)
        value = project("v_proj", kv_heads).repeat_interleave(heads // kv_heads, dim=0)
        scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ value
        return mixed.transpose(0, 1).reshape(length, -1) @ self.weights[f"{prefix}self_attn.o_proj.weight"].T

    def _mlp(self, x: Tensor, prefix: str) -> Tensor:
        gate, up, down = (self.weights[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
        gated = x @ gate.T
        return (gated * torch.sigmoid(gated) * (x @ up.T)) @ down.T


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight


def _rope_table(config: dict, length: int) -> tuple[Tensor, Tensor]:
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    assert rope.get("rope_type", "default") == "default", "the oracle knows unscaled RoPE only"
    assert not config.get("rope_scaling")
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    # The table is made in float32, as every implementation that trains or serves Llama does: angles near position
    # 256 carry 1e-5 of rounding, which belongs to the model and not to the error of whoever is compared.
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().double(), angles.sin().double()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
