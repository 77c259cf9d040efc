"""Settings of the weight swap that cannot do what they say, and the message that names the key and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_kto.config import checks
from nemo_kto.config.load import load_config
from nemo_kto.errors import ConfigError

GIVEN = [f"pretrained_checkpoint.restore_from_path={Path(__file__).parent}", "model.data.data_prefix.train=[a.jsonl]"]
LORA = "model.peft.peft_scheme=lora"
LOOKAHEAD, RESTORE = "model.kto.reference_lookahead", "model.kto.reference_restore"
OFF = "model.kto.reference=adapters_off has none: leave it at"
SHARDED = "model.optim.name=distributed_fused_adam leaves each data-parallel rank the masters of its own shard"


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        ([f"{LOOKAHEAD}=0"], 1, f"{LOOKAHEAD}=0 must be at least 1"),
        ([f"{RESTORE}=disk"], 1, f"{RESTORE}=disk is not one of auto, device, masters, host"),
        ([LORA, f"{LOOKAHEAD}=2"], 1, f"{LOOKAHEAD}=2 saves weight swaps, and {OFF} 1"),
        ([LORA, f"{RESTORE}=host"], 1, f"{RESTORE}=host is about weight swaps, and {OFF} auto"),
        (
            [f"{RESTORE}=masters", "trainer.precision=32"],
            1,
            f"{RESTORE}=masters: with trainer.precision=32 the optimizer updates the live weights and has no masters",
        ),
        ([f"{RESTORE}=masters"], 2, f"{RESTORE}=masters: {SHARDED}; use auto, device or host, or"),
        (
            [LORA, "model.kto.reference=swap", "model.peft.restore_from_path=earlier", f"{RESTORE}=masters"],
            1,
            f"{RESTORE}=masters: adapters are float32 and have no masters",
        ),
        ([f"{RESTORE}=masters", "model.tensor_model_parallel_size=2"], 4, f"{RESTORE}=masters: {SHARDED}"),
    ],
)
def test_what_cannot_be_is_refused(overrides, world, message):
    with pytest.raises(ConfigError) as refused:
        checks.check(load_config([*GIVEN, *overrides]), world)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("overrides", "world"),
    [
        ([f"{LOOKAHEAD}=8", f"{RESTORE}=masters"], 1),
        ([f"{RESTORE}=masters", "model.tensor_model_parallel_size=2"], 2),
        ([f"{RESTORE}=masters", "model.optim.name=adamw"], 2),
        ([f"{RESTORE}=device", "trainer.precision=32"], 2),
        ([LORA, "model.kto.reference=swap", "model.peft.restore_from_path=earlier", f"{LOOKAHEAD}=4"], 1),
    ],
)
def test_what_makes_sense_passes(overrides, world):
    checks.check(load_config([*GIVEN, *overrides]), world)
