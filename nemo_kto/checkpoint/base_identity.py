"""Which weights adapters were trained on, as one hash. Loads nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from nemo_kto.checkpoint.hf_files import weight_files
from nemo_kto.config import manifest
from nemo_kto.config.locate import is_megatron_checkpoint
from nemo_kto.distributed.collectives import raise_together
from nemo_kto.errors import CheckpointError


def base_identity(path: str | Path) -> str:
    """SHA-256 over the files that the weights of a model directory are loaded from, by name and content.

    All ranks call it and share the reading. The same weights in another format have another identity.

    Raises:
        CheckpointError: on every rank: there are no weights, or a file cannot be read.
    """
    folder = Path(path)
    mine: dict[str, str] = {}
    error: Exception | None = None
    try:
        known = manifest.read(folder) if (folder / manifest.MANIFEST).is_file() else {}
        files = _weights(folder, known)[dist.get_rank() :: dist.get_world_size()]
        mine = {file.name: (known.get(file.name) or manifest.record(file)).sha256 for file in files}
    except CheckpointError as problem:
        error = problem
    except OSError as problem:
        error = CheckpointError(f"{folder} cannot be read: {problem}")
    raise_together(error, dist.group.WORLD)
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = sorted({name: digest for part in everyone for name, digest in part.items()}.items())
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _weights(folder: Path, known: Iterable[str]) -> list[Path]:
    if not is_megatron_checkpoint(folder):
        return weight_files(folder)
    listed = [folder / name for name in known if Path(name).match("*.distcp")]
    return sorted(listed or folder.glob("*.distcp"))
