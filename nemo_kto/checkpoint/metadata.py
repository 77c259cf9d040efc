"""torch's checkpoint index is a pickle: here it is read with a list of allowed classes before torch reads it again."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

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


def check_metadata(checkpoint: Path) -> None:
    """Refuse a checkpoint whose index would run code when unpickled.

    Raises:
        CheckpointError: the index is missing, damaged, or names anything but the data classes torch writes there.
    """
    path = checkpoint / _METADATA
    try:
        with path.open("rb") as file:
            _DataOnly(file).load()
    except _ForbiddenError as error:
        raise CheckpointError(f"{path} asks for {error}, which no checkpoint index holds: it may run code") from None
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


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
        raise _ForbiddenError(f"{module}.{name}")


_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
