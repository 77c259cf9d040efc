"""Live Megatron parameters to a Hugging Face directory, streamed shard by shard over the ranks that hold them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from nemo_kto.checkpoint import hf_names
from nemo_kto.checkpoint.hf_files import INDEX, SINGLE
from nemo_kto.checkpoint.hf_names import Rule
from nemo_kto.config.architecture import Architecture, read_architecture
from nemo_kto.distributed.collectives import raise_together
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.errors import CheckpointError
from nemo_kto.gpt.live import parameters_settled, require_policy
from nemo_kto.gpt.network import unwrap

MARKER = "nemo_kto_export.json"
"""Says that a directory is an export of ours, which a later export may replace."""
MAX_SHARD_BYTES = 5 * 10**9
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class Shard:
    """One file of the export: the tensors of consecutive rules, all from one pipeline stage."""

    stage: int
    rules: tuple[Rule, ...]
    file: str = ""


def export_hf(
    chunks: Sequence[torch.nn.Module],
    arch: Architecture,
    groups: ParallelGroups,
    source_dir: str | Path,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model as a directory that ``transformers`` loads. Every rank calls it; ``out_dir`` is shared.

    Each pipeline stage writes its own files from TP rank 0 of data-parallel rank 0, which holds at most one file's
    tensors at a time. Files are written beside ``out_dir`` and moved there in one step once all are complete.

    Args:
        chunks: from ``build_gpt``, bare or wrapped.
        arch: the network.
        groups: the layout of ``chunks``.
        source_dir: where config.json, generation_config.json and the tokenizer come from.
        out_dir: absent, empty, or an earlier export, which is replaced.
        dtype: of the written weights; None keeps the parameters'.
        max_shard_bytes: upper bound of a file, unless one parameter alone exceeds it.

    Raises:
        CheckpointError: on every rank, if ``out_dir`` holds something else, the source is of another architecture,
            or any rank could not write.
    """
    require_policy(chunks, "exporting")
    out_dir, source_dir = Path(out_dir), Path(source_dir)
    draft = out_dir.with_name(f".{out_dir.name}.partial")
    leader = groups.model_rank == 0 and groups.dp_rank == 0
    parameters = [pair for chunk in chunks for pair in unwrap(chunk).global_parameters()]
    dtype = dtype or parameters[0][1].dtype
    shards = plan(arch, groups.pp_size, dtype.itemsize, max_shard_bytes)

    # Each step ends together: a rank that failed alone would leave the others waiting in the next gather.
    world = dist.group.WORLD
    raise_together(_try(_prepare, arch, source_dir, out_dir, draft) if leader else None, world)
    with parameters_settled(chunks):
        raise_together(_write_shards(shards, parameters, arch, groups, draft, dtype), world)
    raise_together(_try(_finish, shards, source_dir, out_dir, draft, dtype) if leader else None, world)


def plan(arch: Architecture, stages: int, itemsize: int, max_shard_bytes: int) -> list[Shard]:
    """Spread the network's tensors over numbered files, from shapes alone.

    Args:
        arch: the network.
        stages: pipeline stages; a file never spans two.
        itemsize: bytes per element.
        max_shard_bytes: size at which a new file begins.
    """
    shards: list[Shard] = []
    size = 0
    for rule in hf_names.rules(arch):
        stage = _stage(rule, arch, stages)
        added = itemsize * sum(torch.Size(shape).numel() for shape in rule.shapes)
        if not shards or shards[-1].stage != stage or size + added > max_shard_bytes:
            shards.append(Shard(stage, ()))
            size = 0
        shards[-1] = Shard(stage, (*shards[-1].rules, rule))
        size += added
    if len(shards) == 1:
        return [Shard(0, shards[0].rules, SINGLE)]
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return [Shard(shard.stage, shard.rules, name) for shard, name in zip(shards, names, strict=True)]


def copy_companions(source_dir: str | Path, out_dir: str | Path) -> None:
    """Copy tokenizer, generation config and licence files, where present, but not config.json and weights."""
    for pattern in _COMPANIONS:
        for file in Path(source_dir).glob(pattern):
            if file.is_file():
                shutil.copyfile(file, Path(out_dir) / file.name)


def _stage(rule: Rule, arch: Architecture, stages: int) -> int:
    if rule.layer is not None:
        return rule.layer * stages // arch.num_layers
    return 0 if rule.names == (hf_names.EMBEDDING,) else stages - 1


def _prepare(arch: Architecture, source_dir: Path, out_dir: Path, draft: Path) -> None:
    if read_architecture(source_dir) != arch:
        raise CheckpointError(f"{source_dir}/config.json describes another architecture than the model to export")
    if out_dir.exists() and not out_dir.is_dir():
        raise CheckpointError(f"{out_dir} is a file; name a directory to export to")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / MARKER).is_file():
        raise CheckpointError(f"{out_dir} is not empty and not an earlier export; choose another directory")
    shutil.rmtree(draft, ignore_errors=True)  # of an export that was cut short
    draft.mkdir(parents=True)


def _write_shards(
    shards: list[Shard],
    parameters: list[tuple[str, torch.nn.Parameter]],
    arch: Architecture,
    groups: ParallelGroups,
    draft: Path,
    dtype: torch.dtype,
) -> CheckpointError | None:
    """Gather and write this stage's files. A writer that fails goes on gathering, because its peers wait for it."""
    if groups.dp_rank != 0:
        return None
    owned = {hf_names.rule_for(arch, name).names: parameter for name, parameter in parameters}
    failure: CheckpointError | None = None
    for shard in shards:
        if shard.stage != groups.pp_rank:
            continue
        tensors: dict[str, torch.Tensor] = {}
        for rule in shard.rules:
            gathered = _gather(owned[rule.names], groups, dtype)
            if gathered:
                tensors |= hf_names.assemble(rule, arch, gathered)
        if groups.tp_rank == 0 and failure is None:
            failure = _try(save_file, tensors, draft / shard.file, {"format": "pt"})
    return failure


def _gather(parameter: torch.nn.Parameter, groups: ParallelGroups, dtype: torch.dtype) -> list[torch.Tensor]:
    """All TP shards of a parameter, on the CPU of TP rank 0; empty elsewhere."""
    shard = parameter.detach().to(dtype).contiguous()
    if groups.tp_size == 1:
        return [shard.cpu()]
    shards = [torch.empty_like(shard) for _ in range(groups.tp_size)] if groups.tp_rank == 0 else None
    dist.gather(shard, shards, dst=dist.get_global_rank(groups.tp, 0), group=groups.tp)
    return [tensor.cpu() for tensor in shards or []]


def _finish(shards: list[Shard], source_dir: Path, out_dir: Path, draft: Path, dtype: torch.dtype) -> None:
    copy_companions(source_dir, draft)
    name = str(dtype).removeprefix("torch.")
    config = json.loads((source_dir / "config.json").read_text(encoding="utf-8"))
    _write_json(draft / "config.json", {**config, "torch_dtype": name, "dtype": name})
    if len(shards) > 1:
        _write_json(draft / INDEX, _index(shards, dtype.itemsize))
    _write_json(draft / MARKER, {"written_by": "nemo_kto", "dtype": name})
    _move(draft, out_dir)


def _index(shards: list[Shard], itemsize: int) -> dict[str, object]:
    stored = [
        (name, shape, shard.file)
        for shard in shards
        for rule in shard.rules
        for name, shape in zip(rule.names, rule.shapes, strict=True)
    ]
    total = itemsize * sum(torch.Size(shape).numel() for _, shape, _ in stored)
    return {"metadata": {"total_size": total}, "weight_map": {name: file for name, _, file in stored}}


def _move(draft: Path, out_dir: Path) -> None:
    """Put ``draft`` in the place of ``out_dir``; at no moment is a part of it there."""
    old = out_dir.with_name(f".{out_dir.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    draft.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _try(function: Callable[..., None], *args: Any) -> CheckpointError | None:
    try:
        function(*args)
    except CheckpointError as error:
        return error
    except (OSError, SafetensorError) as error:
        return CheckpointError(f"export failed: {error}")
    return None
