"""What is said of adapters that a config does not describe can be done: the very numbers come back."""

from __future__ import annotations

import math
import re

import pytest

from nemo_kto.config.lora import LoraSpec
from nemo_kto.errors import ConfigError

RANKS = (1, 3, 4, 8, 16, 32, 60, 128)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 16.0, 24.0, 0.3])
def test_the_advice_gives_the_same_scale(rank, stabilised, alpha):
    scale = alpha / (math.sqrt(rank) if stabilised else rank)
    there = LoraSpec(rank, {"linear_qkv": rank}, scale)
    with pytest.raises(ConfigError) as refused:
        there.check_same(LoraSpec(rank, {"linear_qkv": rank}, scale * 2), "adapters")
    advised = re.search(r"alpha=(\S+) ", str(refused.value))[1]
    assert float(advised) / rank == pytest.approx(scale, rel=1e-11)  # twelve digits are told
    there.check_same(LoraSpec(rank, {"linear_qkv": rank}, float(advised) / rank), "adapters")
