"""Transformer Engine fuses a norm into the linear layer behind it; adapters see the same input either way.

Transformer Engine needs a GPU. Here a stand-in has the attributes that its LayerNormLinear is known by.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_kit import TOKENS, megatron_logits, network, off
from torch import nn

from nemo_kto.config.lora import LoraSpec
from nemo_kto.gpt import lora

TOLERANCE = 1e-5
"""Of logits of about 4: the same operations, in another order inside the norm. An input without norm shows as 1e-1."""
SPEC = LoraSpec(4, {"linear_qkv": 4, "linear_proj": 4, "linear_fc1": 4, "linear_fc2": 4}, 2.0)


class LayerNormLinear(nn.Module):
    """A norm and a linear layer in one, which takes what comes before the norm."""

    def __init__(self, norm: nn.Module, linear: nn.Module, *, zero_centered: bool) -> None:
        super().__init__()
        self.eps, self.zero_centered_gamma = norm.eps, zero_centered
        self.layer_norm_weight = nn.Parameter(norm.weight.detach() - int(zero_centered))
        self.linear = linear

    @property
    def weight(self) -> nn.Parameter:
        return self.linear.weight

    def forward(self, x: torch.Tensor):
        scale = x.float().square().mean(-1, keepdim=True).add(self.eps).rsqrt()
        return self.linear((x.float() * scale * (self.layer_norm_weight + int(self.zero_centered_gamma))).to(x.dtype))


def fuse(chunk, *, zero_centered: bool) -> None:
    """Move the norms into the layers behind them, as Transformer Engine's spec does."""
    for layer in chunk.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        attention.linear_qkv = LayerNormLinear(
            layer.input_layernorm, attention.linear_qkv, zero_centered=zero_centered
        )
        mlp.linear_fc1 = LayerNormLinear(layer.pre_mlp_layernorm, mlp.linear_fc1, zero_centered=zero_centered)
        layer.input_layernorm, layer.pre_mlp_layernorm = nn.Identity(), nn.Identity()


def fill(chunk, groups) -> None:
    lora.attach([chunk], SPEC, groups)
    lora.initialize([chunk], groups, seed=5, column_init="xavier", row_init="normal")


def gradients(chunk) -> list[torch.Tensor]:
    chunk(TOKENS, None, None).square().mean().backward()
    return [parameter.grad for _, _, adapter in lora.low_ranks([chunk]) for parameter in adapter.parameters()]


@pytest.mark.parametrize("zero_centered", [False, True])
def test_adapters_take_what_comes_out_of_a_fused_norm(zero_centered: bool, tiny_llama: Path, groups) -> None:
    local, _ = network(tiny_llama, groups)
    base = megatron_logits(local)
    fused, _ = network(tiny_llama, groups)
    fuse(fused, zero_centered=zero_centered)
    assert off(megatron_logits(fused), base) < TOLERANCE
    fill(local, groups)
    fill(fused, groups)
    assert off(megatron_logits(local), base) > 0.1
    assert off(megatron_logits(fused), megatron_logits(local)) < TOLERANCE
    with lora.adapters_off([fused]):
        assert off(megatron_logits(fused), base) < TOLERANCE
    for ours, wanted in zip(gradients(fused), gradients(local), strict=True):
        assert (ours - wanted).norm() <= 1e-4 * wanted.norm()
    lora.merge([fused])
    assert off(megatron_logits(fused), megatron_logits(local)) < 1e-4


def test_bfloat16_activations_stay_bfloat16(groups) -> None:
    """Float32 weights of norm and adapters do not lift them."""
    linear = nn.Linear(8, 6, bias=False, dtype=torch.bfloat16)
    norm = nn.RMSNorm(8, eps=1e-5)
    fused = LayerNormLinear(norm, linear, zero_centered=False)
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16() * 5
    normed = lora._normed(fused, x)
    assert normed.dtype == torch.bfloat16
    assert off(normed.float(), norm(x.float())) < 0.02  # three numbers rounded to 8 bits
    assert lora._normed(linear, x) is x
    adapter = lora.LowRank(
        linear.weight, 2, scale=1.0, dropout=0.0, is_row=False, sequence_parallel=False, tp=groups.tp
    )
    assert adapter(normed).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
