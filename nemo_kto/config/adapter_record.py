"""What a checkpoint of adapters says of itself and of the base model that it belongs to. Reads no weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_kto.config.architecture import read_architecture
from nemo_kto.config.locate import hf_side
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

        Args:
            base: model directory.
            sha256: of its weights.
            checkpoint: the adapters' own.

        Raises:
            CheckpointError: ``checkpoint`` was trained on other weights, or in a network that computes otherwise.
        """
        if sha256 != self.base_sha256:
            raise CheckpointError(
                f"the adapters of {checkpoint} belong to other base weights (then {self.base}, SHA-256 "
                f"{self.base_sha256[:12]}) than {base} has ({sha256[:12]}): give the model they were trained on, in "
                "the same format"
            )
        check_network(base, checkpoint)


def check_network(base: str | Path, checkpoint: str | Path) -> None:
    """Refuse adapters that were trained in another network than a base model's, whatever its weights.

    The network of a checkpoint is that of the ``hf/config.json`` it holds.

    Raises:
        CheckpointError: names the first constant that differs, or one of the two cannot be read.
    """
    now = asdict(read_architecture(hf_side(base)))
    for name, value in asdict(read_architecture(hf_side(checkpoint))).items():
        if now[name] != value and name != "max_position_embeddings":  # which only bounds the length of rows
            raise CheckpointError(
                f"the adapters of {checkpoint} were trained in another network than {base} is: {name} was {value}, "
                f"now {now[name]}: give the model they were trained on, with its own config.json"
            )


def holds_adapters(path: str | Path) -> bool:
    """Whether a checkpoint directory holds adapters alone."""
    return (Path(path) / FILE).is_file()


def read_record(path: str | Path) -> AdapterRecord:
    """``adapters.json`` of a checkpoint.

    Raises:
        CheckpointError: it or the checkpoint is absent, or it is not what it should be.
    """
    file = Path(path) / FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        base, sha256 = str(values["base"]), str(values["base_sha256"])
    except FileNotFoundError:
        if not Path(path).exists():
            raise CheckpointError(
                f"{path} does not exist: adapters (model.peft.restore_from_path, --adapter) are a checkpoint of a "
                "LoRA run or a PEFT directory"
            ) from None
        raise CheckpointError(f"{path} holds no adapters: it has no {FILE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from error
    return AdapterRecord(LoraSpec.from_json(values, file), base, sha256)
