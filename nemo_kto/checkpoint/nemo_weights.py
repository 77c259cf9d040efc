"""Weights of NeMo 1.x archives: torch files of every rank to safetensors, and the index of distributed checkpoints.

Names are Megatron-Core's behind ``model.``, or ``model.module.`` where NeMo held the weights in a half-precision
wrapper. Nothing is unpickled but tensors and what an allow-list names.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_kto.checkpoint import hf_names
from nemo_kto.checkpoint.hf_files import INDEX, SINGLE
from nemo_kto.checkpoint.metadata import check_metadata, keep_pickles_shut
from nemo_kto.checkpoint.sharded import EXTRA_STATE, PREFIX
from nemo_kto.config.architecture import Architecture
from nemo_kto.errors import CheckpointError

FILE = "model_weights.ckpt"
_RANK = re.compile(r"^(?:mp|tp)_rank_(\d+)(?:_pp_rank_(\d+))?$")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_STACKED = re.compile(r"^decoder\.layers\.(?!\d)")
_HARMLESS = (EXTRA_STATE, "rotary_pos_emb.inv_freq")
_EMBEDDING = "embedding.word_embeddings.weight"
_MAX_FILE_BYTES = 5 * 10**9


def rank_files(folder: Path) -> list[list[Path]]:
    """The torch files of an unpacked archive, [pipeline stage][tensor-parallel rank]; empty where there are none.

    Raises:
        CheckpointError: the file of a rank is missing.
    """
    if (folder / FILE).is_file():
        return [[folder / FILE]]
    found: dict[tuple[int, int], Path] = {}
    for file in sorted(folder.glob(f"*/{FILE}")):
        match = _RANK.match(file.parent.name)
        if match:
            found[int(match[2] or 0), int(match[1])] = file
    stages, ranks = 1 + max((s for s, _ in found), default=-1), 1 + max((r for _, r in found), default=-1)
    for place in ((stage, rank) for stage in range(stages) for rank in range(ranks)):
        if place not in found:
            raise CheckpointError(f"{folder} holds no {FILE} of tensor rank {place[1]} and pipeline rank {place[0]}")
    return [[found[stage, rank] for rank in range(ranks)] for stage in range(stages)]


def to_safetensors(files: list[list[Path]], arch: Architecture, out: Path) -> str:
    """Write the weights as a Hugging Face model has them, a few gigabytes in memory at a time.

    Args:
        files: from :func:`rank_files`.
        arch: the network.
        out: directory for ``model.safetensors``, or several files and their index.

    Returns:
        Their dtype, as torch names it.

    Raises:
        CheckpointError: a file is no file of tensors, or the weights are not those of ``arch``.
    """
    writer = _Writer(out)
    seen: set[tuple[str, ...]] = set()
    offset = 0
    for number, ranks in enumerate(files):
        states = [_load(file) for file in ranks]
        stage = f"{ranks[0]}"
        if any(state.keys() != states[0].keys() for state in states):
            raise CheckpointError(f"{stage}: the tensor-parallel ranks of a stage hold different tensors")
        names = _checked(states[0], arch, stage, offset)
        for name, stored in names.items():
            rule = hf_names.rule_for(arch, name)
            if rule.names in seen:  # the last stage of a tied model holds the embedding again
                if not arch.tied_embeddings or number == 0 or rule.names != (hf_names.EMBEDDING,):
                    raise CheckpointError(f"{stage} holds {stored} a second time")
                continue
            seen.add(rule.names)
            writer.add(_assembled(rule, arch, [state[stored] for state in states], f"{stage}: {stored}"))
        offset += len({match[1] for name in states[0] if (match := _LAYER.match(bare(name)))})
    missing = [rule.names[0] for rule in hf_names.rules(arch) if rule.names not in seen]
    if missing:
        raise CheckpointError(f"{files[0][0]}: no weights for {missing[0]}" + _more(missing))
    return writer.finish()


def check_distributed(folder: Path, arch: Architecture) -> str:
    """Refuse a distributed checkpoint that is not one of ``arch``'s weights, or that would run code.

    Megatron reads what it asks for and ignores the rest, so a bias that is left over must be found here.

    Returns:
        The dtype of the weights, as torch names it.

    Raises:
        CheckpointError: it is in another format, hostile, or of another network.
    """
    backend = _backend(folder)
    if backend != "torch_dist":
        raise CheckpointError(
            f"{folder} is in the format {backend!r}; only torch_dist is read: load it with the NeMo that wrote it and "
            "save it again with model.dist_ckpt_format=torch_dist"
        )
    check_metadata(folder, [])
    stored = FileSystemReader(folder).read_metadata()
    lost = sorted(
        info.relative_path for info in stored.storage_data.values() if not (folder / info.relative_path).is_file()
    )
    if lost:
        raise CheckpointError(f"{folder / lost[0]} is missing, though {folder.name}/.metadata names it")
    index: dict[str, Any] = stored.state_dict_metadata
    names = [name for name in index if name.startswith(PREFIX) and _is_weight(name)]
    check_metadata(folder, names)
    _checked(names, arch, str(folder), 0)
    embedding = index.get(f"{PREFIX}{_EMBEDDING}")
    if not isinstance(embedding, TensorStorageMetadata):
        raise CheckpointError(f"{folder} holds no {PREFIX}{_EMBEDDING}")
    _check_rows(embedding.size[0], arch, f"{folder}: {PREFIX}{_EMBEDDING}")
    return _name_of(embedding.properties.dtype)


def bare(name: str) -> str:
    """A stored name as Megatron-Core has it."""
    return name.removeprefix(PREFIX).removeprefix("module.")


class _Writer:
    """Tensors to numbered safetensors files."""

    def __init__(self, out: Path) -> None:
        self._out, self._waiting, self._size = out, {}, 0  # type: tuple[Path, dict[str, torch.Tensor], int]
        self._map: dict[str, int] = {}
        self._files = 0
        self._total = 0
        self._dtypes: set[torch.dtype] = set()

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._waiting and self._size + size > _MAX_FILE_BYTES:
            self._flush()
        self._waiting |= tensors
        self._size += size
        self._total += size
        self._dtypes |= {tensor.dtype for tensor in tensors.values()}

    def finish(self) -> str:
        self._flush()
        if self._files == 1:
            self._part(1).rename(self._out / SINGLE)
        else:
            names = {i: f"model-{i:05d}-of-{self._files:05d}.safetensors" for i in range(1, self._files + 1)}
            for number, name in names.items():
                self._part(number).rename(self._out / name)
            index = {
                "metadata": {"total_size": self._total},
                "weight_map": {name: names[number] for name, number in self._map.items()},
            }
            (self._out / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        # NeMo's own mix: float32 norms in a half-precision model
        halves = self._dtypes & {torch.bfloat16, torch.float16}
        return _name_of(halves.pop() if len(halves) == 1 and len(self._dtypes) == 1 else torch.float32)

    def _flush(self) -> None:
        self._files += 1
        try:
            save_file(self._waiting, self._part(self._files), {"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        self._map |= dict.fromkeys(self._waiting, self._files)
        self._waiting, self._size = {}, 0

    def _part(self, number: int) -> Path:
        return self._out / f"part-{number}.safetensors"


def _load(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one rank, mapped from the file. FP8 scales, which NeMo kept as byte streams, are left out."""
    keep_pickles_shut()
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # data, and nothing else
            state: Any = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"(?:Unsupported global: )?GLOBAL (\S+)", str(error))
        what = f"asks for {reason[1]}, which may run code" if reason else "is no file of tensors"
        raise CheckpointError(f"{file} {what}") from None
    except Exception as error:  # torch raises whatever the broken file provokes
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {_line(error)}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds no tensors by name")
    kept = {str(name): value for name, value in state.items() if _is_weight(str(name))}
    for name, value in kept.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.layout != torch.strided:
            raise CheckpointError(f"{file}: {name} is no dense tensor of floating point numbers")
    return kept


def _checked(names: Iterable[str], arch: Architecture, where: str, offset: int) -> dict[str, str]:
    """Stored names by Megatron's, whose layers count over all stages, from ``offset`` on."""
    wanted = {name for rule in hf_names.rules(arch) for name in rule.names}
    found: dict[str, str] = {}
    for stored in names:
        name = bare(stored)
        if name.startswith("language_model."):
            raise CheckpointError(f"{where}: {stored} is of a model without Megatron-Core (mcore_gpt=false)")
        name = _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + offset}.", name)
        one = _STACKED.sub("decoder.layers.0.", name)  # distributed checkpoints stack all layers in one tensor
        try:
            rule = hf_names.rule_for(arch, one)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from None
        if not set(rule.names) <= wanted:
            raise CheckpointError(f"{where}: {stored} is unexpected: the settings describe a network without it")
        found[name] = stored
    return found


def _assembled(
    rule: hf_names.Rule, arch: Architecture, shards: list[torch.Tensor], where: str
) -> dict[str, torch.Tensor]:
    if rule.kind is hf_names.Kind.VOCAB:
        _check_rows(sum(shard.shape[0] for shard in shards), arch, where)
    try:
        tensors = hf_names.assemble(rule, arch, shards)
    except (RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{where}: {_shapes(shards)} cannot be {', '.join(rule.names)}: {_line(error)}"
        ) from None
    for (name, tensor), shape in zip(tensors.items(), rule.shapes, strict=True):
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{where}: {_shapes(shards)} makes {name} {list(tensor.shape)}, not {list(shape)}")
    return {name: tensor.clone() for name, tensor in tensors.items()}  # off the mapped file, which goes


def _check_rows(rows: int, arch: Architecture, where: str) -> None:
    if rows < arch.vocab_size:
        raise CheckpointError(f"{where} has {rows} rows, fewer than the tokenizer's {arch.vocab_size} entries")


def _backend(folder: Path) -> str:
    try:
        values = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        return str(values["sharded_backend"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder}/metadata.json cannot be read: {type(error).__name__}: {error}") from None


def _is_weight(name: str) -> bool:
    return not name.endswith(_HARMLESS) and EXTRA_STATE not in name


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shapes(shards: list[torch.Tensor]) -> str:
    return " + ".join(str(list(shard.shape)) for shard in shards)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
