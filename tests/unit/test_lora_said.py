"""What a run of LoRA is told before anything is built: of its rate, and of adapters that are not there."""

from __future__ import annotations

import pytest

from nemo_kto.config.adapter_record import read_record
from nemo_kto.config.load import load_config
from nemo_kto.config.lora import rate_warning
from nemo_kto.errors import CheckpointError

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


def test_adapters_that_are_not_there(tmp_path):
    """A resumed run does not read them, so they are missed only when they are read."""
    with pytest.raises(CheckpointError, match=r"nowhere does not exist: adapters \(model\.peft\.restore_from_path"):
        read_record(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no adapters"):
        read_record(tmp_path)
