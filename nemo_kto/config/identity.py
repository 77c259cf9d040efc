"""What must stay the same while a run is stopped and resumed. Compares; reads no file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nemo_kto.config.architecture import Architecture
from nemo_kto.config.lora import reference_mode
from nemo_kto.config.schema import Config

DATA = "model.data.data_prefix.train"
TOKENIZER = "tokenizer"
BATCH_SIZE = "model.global_batch_size"
NETWORK = "network"
_FREE_KTO_KEYS = (
    "log_prob_forward_micro_batch_size",
    "reference",
    "reference_from_path",
    "reference_lookahead",
    "reference_restore",
    "reference_cache_dir",
)
"""Of ``model.kto``: how the same numbers are computed, and paths."""
_LORA_KEYS = ("target_modules", "adapter_dim", "alpha", "layer_selection")
_DATA_KEYS = ("seq_length", "shuffle", "append_eos", "overlong")


@dataclass(frozen=True)
class FileDigests:
    """SHA-256 of the files that make the tokens.

    Attributes:
        data: (name as given, digest) of each data file, in order.
        tokenizer: (name within the model's directory, digest) of each file that the tokenizer may read.
    """

    data: tuple[tuple[str, str], ...]
    tokenizer: tuple[tuple[str, str], ...]


def identity(config: Config, digests: FileDigests, network: Architecture) -> dict[str, Any]:
    """Everything that decides which samples a step sees and what is minimised on them, as JSON values by key.

    Layout, micro-batch, optimizer, length of the run, validation, workers and paths are free to change.

    Args:
        config: the run.
        digests: of its training files and tokenizer.
        network: what it trains.
    """
    model = config.model
    values: dict[str, Any] = {BATCH_SIZE: model.global_batch_size, "model.seed": model.seed}
    values |= {f"model.kto.{key}": value for key, value in asdict(model.kto).items() if key not in _FREE_KTO_KEYS}
    values |= {f"model.data.{key}": getattr(model.data, key) for key in _DATA_KEYS}
    values |= _adapters(config)
    values["trainer.kto.limit_train_batches"] = config.trainer.kto.limit_train_batches
    values[DATA] = [{"file": name, "sha256": digest} for name, digest in digests.data]
    # config.json counts by what it says: a tool that saves the same network again writes other bytes
    values[TOKENIZER] = {name: digest for name, digest in digests.tokenizer if name != "config.json"}
    return values | {f"{NETWORK}.{key}": value for key, value in asdict(network).items()}


def _adapters(config: Config) -> dict[str, Any]:
    peft, values = config.model.peft, {"model.peft.peft_scheme": config.model.peft.peft_scheme}
    if peft.peft_scheme == "none":
        return values
    tuning = {f"model.peft.lora_tuning.{key}": getattr(peft.lora_tuning, key) for key in _LORA_KEYS}
    return {**values, "model.kto.reference": reference_mode(config.model), **tuning}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per difference between two identities: its key, the old and the new value.

    A key that one of them does not have is of another version of this package, and tells nothing.
    """
    lines: list[str] = []
    for key in (key for key in now if key in saved and not _equal(saved[key], now[key])):
        if key == DATA:
            lines += [f"{DATA}: {line}" for line in _data_differences(saved[key], now[key])]
        elif key == TOKENIZER:
            lines += [f"{TOKENIZER}: {line}" for line in _tokenizer_differences(saved[key], now[key])]
        else:
            lines.append(f"{key} was {_shown(saved[key])}, now {_shown(now[key])}")
    return lines


def _equal(one: Any, other: Any) -> bool:
    """As JSON: 1.0 and 1 are two settings where one is a fraction and the other a number."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _data_differences(saved: list[dict[str, str]], now: list[dict[str, str]]) -> Iterator[str]:
    if sorted(f["sha256"] for f in saved) == sorted(f["sha256"] for f in now):
        if [f["sha256"] for f in saved] != [f["sha256"] for f in now]:
            yield f"the same files in another order: {_names(saved)}, now {_names(now)}"
        return
    for number, (before, after) in enumerate(zip(saved, now, strict=False), 1):
        if before["sha256"] != after["sha256"]:
            was = f" (then {before['file']})" if before["file"] != after["file"] else ""
            yield f"file {number}, {after['file']}{was}, holds other bytes than then"
    for number, file in enumerate(saved[len(now) :], len(now) + 1):
        yield f"file {number}, {file['file']}, is gone"
    for number, file in enumerate(now[len(saved) :], len(saved) + 1):
        yield f"file {number}, {file['file']}, is new"


def _tokenizer_differences(saved: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    for name in sorted({*saved, *now}):
        if name not in now:
            yield f"{name} is gone"
        elif name not in saved:
            yield f"{name} is new"
        elif saved[name] != now[name]:
            yield f"{name} holds other bytes than then"


def _names(files: list[dict[str, str]]) -> str:
    return ", ".join(file["file"] for file in files)
