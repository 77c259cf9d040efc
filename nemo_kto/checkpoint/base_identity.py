"""Which weights adapters were trained on, as one hash. Loads nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch.distributed as dist

from nemo_kto.config import manifest
from nemo_kto.config.locate import is_megatron_checkpoint
from nemo_kto.distributed.collectives import raise_together
from nemo_kto.errors import CheckpointError


def base_identity(path: str | Path) -> str:
    """SHA-256 over the weight files of a model directory, by name and content.

    All ranks call it and share the reading. The same weights in another format have another identity.

    Raises:
        CheckpointError: on every rank: a file cannot be read.
    """
    folder = Path(path)
    pattern = "*.distcp" if is_megatron_checkpoint(folder) else "*.safetensors"
    mine: dict[str, str] = {}
    error: Exception | None = None
    try:
        if (folder / manifest.MANIFEST).is_file():
            mine = {name: record.sha256 for name, record in manifest.read(folder).items() if Path(name).match(pattern)}
        else:
            files = sorted(folder.glob(pattern))
            mine = {
                file.name: manifest.record(file).sha256 for file in files[dist.get_rank() :: dist.get_world_size()]
            }
    except OSError as problem:
        error = CheckpointError(f"{folder} cannot be read: {problem}")
    raise_together(error, dist.group.WORLD)
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = sorted({name: digest for part in everyone for name, digest in part.items()}.items())
    return hashlib.sha256(repr(found).encode()).hexdigest()
