"""A run of LoRA with a rate for full fine-tuning is told so."""

from __future__ import annotations

import pytest

from nemo_kto.config.load import load_config
from nemo_kto.config.lora import rate_warning

GIVEN = ["pretrained_checkpoint.restore_from_path=model", "model.data.data_prefix.train=[a.jsonl]"]
LORA = ["model.peft.peft_scheme=lora"]


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        ([], False),
        (LORA, True),
        ([*LORA, "model.optim.lr=4.9e-5"], True),
        ([*LORA, "model.optim.lr=5e-5"], False),
        ([*LORA, "model.optim.lr=2e-4"], False),
    ],
)
def test_a_rate_too_low_for_adapters_is_told(overrides, warned):
    warning = rate_warning(load_config([*GIVEN, *overrides]).model)
    assert (warning is not None) == warned
    if warning is not None:
        assert warning.startswith("model.optim.lr=")
        assert "docs/lora.md" in warning
