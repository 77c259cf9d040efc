"""What a checkpoint of adapters says of itself and of the base model that it belongs to. Reads no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nemo_kto.config.lora import LoraSpec
from nemo_kto.errors import CheckpointError

FILE = "adapters.json"
"""Its presence makes a checkpoint one of adapters alone."""


@dataclass(frozen=True)
class AdapterRecord:
    """``adapters.json`` of a checkpoint.

    Attributes:
        spec: the adapters.
        base: the base model's path, as it was given.
        base_sha256: of its weights: :func:`nemo_kto.checkpoint.base_identity.base_identity`.
    """

    spec: LoraSpec
    base: str
    base_sha256: str

    def to_json(self) -> str:
        """The file's text."""
        values = {"peft_scheme": "lora", "base": self.base, "base_sha256": self.base_sha256, **self.spec.to_json()}
        return json.dumps(values, indent=1)

    def check_base(self, base: str | Path, sha256: str, checkpoint: str | Path) -> None:
        """Refuse adapters of another base model.

        Raises:
            CheckpointError: ``sha256`` of ``base`` is not the one that ``checkpoint`` was trained on.
        """
        if sha256 != self.base_sha256:
            raise CheckpointError(
                f"the adapters of {checkpoint} belong to other base weights (then {self.base}, SHA-256 "
                f"{self.base_sha256[:12]}) than {base} has ({sha256[:12]}): give the model they were trained on"
            )


def holds_adapters(path: str | Path) -> bool:
    """Whether a checkpoint directory holds adapters alone."""
    return (Path(path) / FILE).is_file()


def read_record(path: str | Path) -> AdapterRecord:
    """``adapters.json`` of a checkpoint.

    Raises:
        CheckpointError: it is absent, or not what it should be.
    """
    file = Path(path) / FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        base, sha256 = str(values["base"]), str(values["base_sha256"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} holds no adapters: it has no {FILE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from error
    return AdapterRecord(LoraSpec.from_json(values, file), base, sha256)
