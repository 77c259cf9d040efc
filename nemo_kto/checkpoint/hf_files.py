"""The safetensors of a Hugging Face directory: what they hold, and slices of it. Knows no network."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_kto.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""


class HFTensors:
    """All tensors of a Hugging Face directory, opened once, read by slices. A context manager.

    Opening reads every file's header, and so finds missing, truncated and corrupt files before anything is loaded.
    Tensor data is mapped: only what is asked for is read.

    Raises:
        CheckpointError: no safetensors, a file that the index names is missing, or a file that cannot be read.
    """

    def __init__(self, hf_dir: str | Path) -> None:
        self.bytes_read = 0
        """Bytes of tensor data read so far."""
        self.tensors: dict[str, StoredTensor] = {}
        self._open: dict[Path, Any] = {}
        folder = Path(hf_dir)
        index = folder / INDEX
        with ExitStack() as stack:
            for file in weight_files(folder):
                self._add(file, stack)
            if index.is_file():
                self._compare(index)
            self._stack = stack.pop_all()

    def __enter__(self) -> HFTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, name: str, bounds: tuple[int, int, int] | None = None) -> torch.Tensor:
        """A tensor in its stored dtype, on the CPU.

        Args:
            name: of the tensor.
            bounds: (dimension 0 or 1, start, stop) to read only that slice.

        Raises:
            CheckpointError: the data cannot be read.
        """
        file = self.tensors[name].file
        try:
            stored = self._open[file].get_slice(name)
            tensor: torch.Tensor = stored[_selection(bounds)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot read {name}: {error}") from error
        self.bytes_read += tensor.nbytes
        return tensor

    def _add(self, file: Path, stack: ExitStack) -> None:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, but {INDEX} names it; copy the whole model directory")
        try:
            opened = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                header = opened.get_slice(name)
                self._check(name, StoredTensor(file, tuple(header.get_shape()), header.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: truncated or corrupt ({error}); copy or download it again") from error
        self._open[file] = opened

    def _check(self, name: str, stored: StoredTensor) -> None:
        if name in self.tensors:
            raise CheckpointError(f"{stored.file}: {name} is also in {self.tensors[name].file.name}")
        if stored.dtype not in _FLOATS:
            raise CheckpointError(f"{stored.file}: {name} is {stored.dtype}; only {', '.join(_FLOATS)} can be loaded")
        self.tensors[name] = stored

    def _compare(self, index: Path) -> None:
        for name, file in _weight_map(index).items():
            if name not in self.tensors:
                raise CheckpointError(f"{index.parent / file}: {name} is missing, but {INDEX} says it is there")


def _selection(bounds: tuple[int, int, int] | None) -> tuple[slice, ...] | slice:
    if bounds is None:
        return slice(None)
    dim, start, stop = bounds
    return (slice(None),) * dim + (slice(start, stop),)


def weight_files(hf_dir: str | Path) -> list[Path]:
    """The files that the weights of a Hugging Face directory are loaded from; others that lie there do not count.

    Raises:
        CheckpointError: there are none, or the index is damaged. Files that it names need not be there.
    """
    index = Path(hf_dir) / INDEX
    return _indexed(index) if index.is_file() else _single(Path(hf_dir))


def _single(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    fix = (
        f"{pickled[0].name} is a pickle, which is never loaded; convert the model to safetensors"
        if pickled
        else "give a Hugging Face directory with its weights"
    )
    raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there; {fix}")


def _indexed(index: Path) -> list[Path]:
    return [index.parent / file for file in sorted(set(_weight_map(index).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weights: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = [file for file in weights.values() if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error!r})") from None
    if outside:
        raise CheckpointError(f"{index}: {outside[0]!r} is not a file name in this directory")
    return weights
