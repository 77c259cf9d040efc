"""Which adapters a resumed LoRA run has: those of its checkpoints, whatever has become of where they started from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_identity import CHANGES, GIVEN, check, checkpoint, of

from nemo_kto.config import manifest
from nemo_kto.config.adapter_record import FILE, AdapterRecord
from nemo_kto.config.load import load_config
from nemo_kto.config.lora import LoraSpec, lora_spec
from nemo_kto.config.resume import RECORD, resumed_spec, run_adapters
from nemo_kto.errors import ConfigError

TUNING = "model.peft.lora_tuning"
LORA = [
    *("model.peft.peft_scheme=lora", f"{TUNING}.adapter_dim=4", f"{TUNING}.alpha=8"),
    *(f"{TUNING}.target_modules=[attention]", f"{TUNING}.layer_selection=[2,3]"),
]


def adapters(log_dir: Path, spec: LoraSpec, step: int) -> Path:
    """A checkpoint of a run of ``LORA``; what it holds is another matter."""
    folder = checkpoint(log_dir, None, step)
    (folder / RECORD).write_text(json.dumps({"identity": of(*LORA)}))
    (folder / FILE).write_text(AdapterRecord(spec, "model", "5e").to_json())
    manifest.complete(folder, {})
    return folder


def test_a_resumed_runs_adapters_are_those_of_its_checkpoint(tmp_path):
    """At the ranks they have there, wherever they once started from; the newest may be damaged, or all."""
    spec = LoraSpec(4, {"linear_qkv": 12, "linear_proj": 4}, 2.0, (1, 2))
    older, newest = (adapters(tmp_path, spec, step) for step in (3, 5))
    config = load_config([*GIVEN, *LORA, "model.peft.restore_from_path=nowhere"])
    assert resumed_spec(config, newest) == spec
    (newest / FILE).write_text((newest / FILE).read_text().replace("12", "16"))
    assert resumed_spec(config, newest) == spec
    (older / FILE).unlink()
    assert run_adapters(newest) is None
    assert resumed_spec(config, newest) == lora_spec(config.model.peft)


def test_adapters_must_fit_even_where_changes_are_wanted(tmp_path):
    """Any scale does, as no number that is stored depends on it."""
    spec = LoraSpec(4, {"linear_qkv": 12, "linear_proj": 4}, 2.0, (1, 2))
    newest = adapters(tmp_path, spec, 5)
    (note,) = check(tmp_path, *LORA, f"{TUNING}.alpha=4", CHANGES)
    assert note.endswith(f"{TUNING}.alpha was 8.0, now 4.0")
    config = load_config([*GIVEN, *LORA, f"{TUNING}.alpha=4", CHANGES])
    assert resumed_spec(config, newest) == replace(spec, scale=1.0)
    with pytest.raises(ConfigError, match=r"alpha was 8\.0, now 4\.0\n"):
        check(tmp_path, *LORA, f"{TUNING}.alpha=4")
    for word in (f"{TUNING}.adapter_dim=8", f"{TUNING}.layer_selection=null", f"{TUNING}.target_modules=[all]"):
        with pytest.raises(ConfigError, match=r"adapters of .*step-000005: set .*=4 alpha=8 .*\[2,3\]"):
            check(tmp_path, *LORA, word, CHANGES)
