"""Adapters from and to PEFT's directories, where a fused layer of Megatron's is several modules with adapters each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_kto.checkpoint import hf_names
from nemo_kto.config.architecture import Architecture
from nemo_kto.config.lora import LoraSpec
from nemo_kto.config.peft_dir import PROJECTIONS, WEIGHTS, read_adapters
from nemo_kto.errors import CheckpointError

_PREFIX = "base_model.model.model.layers"


class PeftTensors:
    """``adapter_model.safetensors``, whole: adapters are small.

    Args:
        folder: directory that PEFT has saved to.
        arch: the base model's.

    Raises:
        CheckpointError: it cannot be read, or tensors are missing, unexpected or of the wrong shape.
    """

    def __init__(self, folder: str | Path, arch: Architecture) -> None:
        self.adapters = read_adapters(folder)
        self._arch = arch
        self._file = Path(folder) / WEIGHTS
        try:
            with safe_open(self._file, "pt") as stored:
                self._tensors: dict[str, Tensor] = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._file} cannot be read: {error}") from error
        self._check()

    def spec(self) -> LoraSpec:
        """The adapters that hold the same function on Megatron's layers.

        The modules of a fused layer share one A there. Where theirs differ, the layer's A is all of them one above
        the other, and its rank their sum.
        """
        given = self.adapters
        ranks = {}
        for linear in PROJECTIONS:
            present = self._present(linear)
            if present:
                each = [given.ranks[_short(name)] for name in present]
                ranks[linear] = each[0] if self._share(linear) else sum(each)
        return LoraSpec(given.rank, ranks, given.scale, given.layers)

    def matrices(self, layer: int, linear: str) -> tuple[Tensor, Tensor]:
        """A and B of one fused layer, float32, unsharded, the rows of B in Megatron's order on one rank."""
        present, shared = self._present(linear), self._share(linear)
        above = [self._get(layer, name, "A") for name in (present[:1] if shared else present)]
        width, start = sum(a.shape[0] for a in above), 0
        rows = [shape[0] for shape in shapes(self._arch, linear)]
        parts = [torch.zeros(height, width) for height in rows]
        for part, name in zip(parts, PROJECTIONS[linear], strict=True):
            if name in present:
                b = self._get(layer, name, "B")
                part[:, start : start + b.shape[1]] = b
                start += 0 if shared else b.shape[1]
        rule = hf_names.rule_for(self._arch, f"decoder.layers.{layer}.{_weight(linear)}")
        return torch.cat(above), hf_names.join(rule, self._arch, parts, rows=sum(rows))

    def _present(self, linear: str) -> list[str]:
        return [name for name in PROJECTIONS[linear] if _short(name) in self.adapters.ranks]

    def _layers(self) -> tuple[int, ...]:
        return tuple(range(self._arch.num_layers)) if self.adapters.layers is None else self.adapters.layers

    def _share(self, linear: str) -> bool:
        present = self._present(linear)
        return all(
            torch.equal(self._get(layer, present[0], "A"), self._get(layer, name, "A"))
            for layer in self._layers()
            for name in present[1:]
        )

    def _get(self, layer: int, name: str, half: str) -> Tensor:
        return self._tensors[_key(layer, name, half)].float()

    def _check(self) -> None:
        beyond = [layer for layer in self._layers() if not 0 <= layer < self._arch.num_layers]
        if beyond:
            raise CheckpointError(f"{self._file}: the model has {self._arch.num_layers} layers, none is {beyond[0]}")
        wanted = {name: shape for layer in self._layers() for name, shape in self._wanted(layer)}
        for names, what in ((wanted.keys() - self._tensors, "missing"), (self._tensors.keys() - wanted, "unexpected")):
            if names:
                raise CheckpointError(f"{self._file}: {min(names)} is {what}")
        for name, shape in wanted.items():
            found = tuple(self._tensors[name].shape)
            if found != shape:
                raise CheckpointError(f"{self._file}: {name} is {list(found)}, the base model asks for {list(shape)}")

    def _wanted(self, layer: int) -> Iterator[tuple[str, tuple[int, int]]]:
        for linear in PROJECTIONS:
            for name, (rows, columns) in zip(PROJECTIONS[linear], shapes(self._arch, linear), strict=True):
                rank = self.adapters.ranks.get(_short(name))
                if rank is not None:
                    yield _key(layer, name, "A"), (rank, columns)
                    yield _key(layer, name, "B"), (rows, rank)


def split(arch: Architecture, layer: int, linear: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """PEFT's tensors of one fused layer: every module gets A, and its own rows of B.

    Args:
        arch: the base model's.
        layer: decoder layer, from 0.
        linear: Megatron's name.
        a: [rank, in].
        b: [out, rank], rows in Megatron's order on one rank.
    """
    rule = hf_names.rule_for(arch, f"decoder.layers.{layer}.{_weight(linear)}")
    tensors: dict[str, Tensor] = {}
    for name, part in zip(PROJECTIONS[linear], hf_names.split(rule, arch, b), strict=True):
        tensors[_key(layer, name, "A")] = a.clone()
        tensors[_key(layer, name, "B")] = part.contiguous()
    return tensors


def _weight(linear: str) -> str:
    parent = "self_attention" if linear in ("linear_qkv", "linear_proj") else "mlp"
    return f"{parent}.{linear}.weight"


def shapes(arch: Architecture, linear: str) -> tuple[tuple[int, ...], ...]:
    """[out, in] of each Hugging Face module that a linear layer of Megatron's is made of."""
    return hf_names.rule_for(arch, f"decoder.layers.0.{_weight(linear)}").shapes


def _short(name: str) -> str:
    return name.rsplit(".", 1)[1]


def _key(layer: int, name: str, half: str) -> str:
    return f"{_PREFIX}.{layer}.{name}.lora_{half}.weight"
