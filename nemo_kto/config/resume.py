"""Whether a run may go on from a checkpoint with the settings and files it is given now. Loads no weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_kto.config import adapter_record, manifest
from nemo_kto.config.adapter_record import AdapterRecord
from nemo_kto.config.identity import BATCH_SIZE, differences
from nemo_kto.config.locate import resume_path
from nemo_kto.config.lora import LoraSpec, lora_spec
from nemo_kto.config.schema import Config
from nemo_kto.errors import CheckpointError, ConfigError

RECORD = "run.json"
"""File of a checkpoint that tells, without torch, what its run was: ``identity``, ``reference`` and counters."""


def check_resume(config: Config, now: Mapping[str, Any]) -> list[str]:
    """Compare this run with the one whose checkpoint it would go on from.

    Args:
        config: the run.
        now: its :func:`~nemo_kto.config.identity.identity`.

    Returns:
        What is to be said as a warning: differences that ``exp_manager.resume_with_changes`` allows, or that there is
        nothing to compare with.

    Raises:
        ConfigError: they differ, one line per difference; or, with changes allowed, the adapters do not fit.
        CheckpointError: see :func:`~nemo_kto.config.locate.resume_path`.
    """
    checkpoint = resume_path(config.exp_manager)
    if checkpoint is None:
        return []
    record = run_record(checkpoint)
    if not record.get("identity"):
        return [
            f"{checkpoint} does not tell what it was trained on: whether data, tokenizer, seed, batch size and loss "
            "are the same is not checked"
        ]
    found = differences(record["identity"], now)
    if not found:
        return []
    if not config.exp_manager.resume_with_changes:
        raise ConfigError(
            f"{checkpoint} is of a run with other settings or files:\n"
            + "".join(f"  {line}\n" for line in found)
            + "put them back, or set exp_manager.resume_with_changes=true to go on with what is given now"
        )
    if record["identity"].get(BATCH_SIZE) != config.model.global_batch_size:
        _check_new_batch_size(config, checkpoint, record)
    resumed_spec(config, checkpoint)
    return [f"going on from {checkpoint} with changes: {line}" for line in found]


def run_record(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its run, or, where that is damaged, what the newest other one of the same run says.

    A record counts only if its bytes are those that the checkpoint's manifest was made of; empty where none is.
    """
    for path in _sound(checkpoint, RECORD):
        try:
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and isinstance(record.get("identity"), dict):
            return record
    return {}


def run_adapters(checkpoint: Path) -> AdapterRecord | None:
    """The adapters of the run that a checkpoint is of, told as :func:`run_record` tells; None where it has none.

    Raises:
        CheckpointError: a version that this one does not understand has written it.
    """
    path = next(_sound(checkpoint, adapter_record.FILE), None)
    return None if path is None else adapter_record.read_record(path)


def resumed_spec(config: Config, checkpoint: Path) -> LoraSpec | None:
    """The adapters of a run that goes on from ``checkpoint``: that has them all, so where they started is not read.

    ``exp_manager.resume_with_changes`` may change their scale, as no number that is stored depends on it.

    Returns:
        None without adapters; what the config describes where no checkpoint of the run tells.

    Raises:
        ConfigError: the config describes other adapters.
    """
    wanted, record = lora_spec(config.model.peft), run_adapters(checkpoint)
    if wanted is None or record is None:
        return wanted
    found, may_differ = record.spec, config.exp_manager.resume_with_changes
    found.check_same(replace(wanted, scale=found.scale) if may_differ else wanted, checkpoint)
    return replace(found, scale=wanted.scale)


def _sound(checkpoint: Path, name: str) -> Iterator[Path]:
    """A checkpoint and the others of its run, newest first, as far as their file ``name`` is as it was written."""
    for path in (checkpoint, *sorted(checkpoint.parent.glob("step-*"), reverse=True)):
        try:
            wanted = manifest.read(path).get(name)
            if wanted is not None and manifest.record(path / name) == wanted:
                yield path
        except (CheckpointError, OSError):
            continue


def _check_new_batch_size(config: Config, checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Steps are counted as consumed samples over the batch size, so a new one gives them new numbers."""
    size, consumed = config.model.global_batch_size, record.get("consumed_samples", 0)
    change = f"{BATCH_SIZE} was {record['identity'].get(BATCH_SIZE)}, now {size}"
    if checkpoint.resolve().parent == (Path(config.exp_manager.explicit_log_dir) / "checkpoints").resolve():
        raise ConfigError(
            f"{change}: steps would have other numbers than this directory's checkpoints and metrics. Set "
            f"exp_manager.resume_from_checkpoint={checkpoint} and another exp_manager.explicit_log_dir"
        )
    if consumed % size:
        raise ConfigError(
            f"{change}: the run of {checkpoint} has consumed {consumed} samples, no multiple of {size}: choose a "
            f"{BATCH_SIZE} that divides it"
        )
