"""Checkpoints that try to run code when they are loaded, each in another place. Their manifests are in order."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from training_kit import Run, Setup

NORM = "model.decoder.final_layernorm.weight"


class Payload:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def _common(folder: Path, mark: Path) -> None:
    torch.save({"common": Payload(mark)}, folder / "common.pt")


def _index(folder: Path, mark: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(mark)))


def _object_for_tensor(folder: Path, mark: Path) -> None:
    """The index says that a weight is a pickled object."""
    torch.save(Payload(mark), folder / "evil.distcp")
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.state_dict_metadata[NORM] = BytesStorageMetadata()
    size = (folder / "evil.distcp").stat().st_size
    index.storage_data = {place: info for place, info in index.storage_data.items() if place.fqn != NORM}
    index.storage_data[MetadataIndex(NORM)] = _StorageInfo("evil.distcp", 0, size)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def _shard(folder: Path, mark: Path) -> None:
    """A tensor's own bytes are a pickle."""
    for file in folder.glob("*.distcp"):
        torch.save(Payload(mark), file)


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "common.pt": _common,
    ".metadata": _index,
    "object for tensor": _object_for_tensor,
    "shard": _shard,
}


def hostile(rank: int, root: Path) -> dict[str, tuple[str, str, bool]]:
    """The error of each, and whether its code ran; weights alone, and a whole run's state."""
    from nemo_kto.checkpoint import dist
    from nemo_kto.config import manifest

    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # some set it for other programs
    run = Run(Setup(), root / "model")
    run.train(1)
    run.save(root / "harmless")
    found = {}
    for name, harm in KINDS.items():
        for whole in (False, True):
            place = root / f"hostile-{name.replace(' ', '-')}-{whole}"
            folder, mark = place / "step-000001", place / "ran"
            shutil.copytree(root / "harmless", folder)
            harm(folder, mark)
            (folder / manifest.MANIFEST).unlink()
            manifest.complete(folder, {})
            try:
                if whole:
                    run.load(folder)
                else:
                    dist.load_model(run.chunks, folder, run.groups)
                found[f"{name} {whole}"] = ("", "", mark.exists())
            except Exception as error:  # its type is what the test looks at
                found[f"{name} {whole}"] = (type(error).__name__, str(error), mark.exists())
    return found
