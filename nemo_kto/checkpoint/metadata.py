"""torch's checkpoint index is a pickle: here it is read with a list of allowed classes before torch reads it again."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from enum import EnumMeta
from pathlib import Path, PurePosixPath
from typing import Any

from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from nemo_kto.errors import CheckpointError

_METADATA = ".metadata"
_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "megatron.core.dist_checkpointing.core",
)
_CLASSES = {
    ("builtins", "dict"),
    ("builtins", "list"),
    ("builtins", "set"),
    ("builtins", "tuple"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
}


def keep_pickles_shut() -> None:
    """Before torch.load: take away the variable that makes it unpickle anything, also under ``weights_only=True``."""
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)


def check_metadata(checkpoint: Path, tensors: Iterable[str]) -> None:
    """Refuse a checkpoint that would run code when it is read.

    torch unpickles its index, and whatever the index declares to be an object where a tensor is asked for.

    Args:
        checkpoint: the directory.
        tensors: names that are going to be read as tensors.

    Raises:
        CheckpointError: the index is missing, damaged, names anything but the data classes torch writes there,
            declares a pickled object in place of a tensor, or points out of the directory.
    """
    keep_pickles_shut()
    path = checkpoint / _METADATA
    try:
        with path.open("rb") as file:
            index = _DataOnly(file).load()
        pickled = [name for name in tensors if isinstance(index.state_dict_metadata.get(name), BytesStorageMetadata)]
        outside = [info.relative_path for info in index.storage_data.values() if _leaves(info.relative_path)]
    except _ForbiddenError as error:
        raise CheckpointError(f"{path} asks for {error}, which no checkpoint index holds: it may run code") from None
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if pickled:
        raise CheckpointError(f"{path} holds a pickled object where the tensor {pickled[0]} belongs: it may run code")
    if outside:
        raise CheckpointError(f"{path} points to {outside[0]}, outside the checkpoint")


def _leaves(relative: str) -> bool:
    return relative.startswith("/") or ".." in PurePosixPath(relative).parts


class _ForbiddenError(Exception):
    """The pickle names something that is not on the list."""


class _DataOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module == "torch" and name in _DTYPES) or (module, name) in _CLASSES:
            return super().find_class(module, name)
        if module in _MODULES and name.isidentifier():
            found = super().find_class(module, name)
            # not what the module imports: that would reach everything
            if isinstance(found, type) and found.__module__ == module:
                return found
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise _ForbiddenError(f"{module}.{name}")


def _member(kind: Any, name: Any) -> Any:
    """All that an index may use ``getattr`` for: before 3.11.3, Python 3.11 pickles a member of an enum as one."""
    if isinstance(kind, EnumMeta) and isinstance(name, str) and name in kind.__members__:
        return kind[name]
    raise _ForbiddenError(f"builtins.getattr of {kind!r}")


_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
