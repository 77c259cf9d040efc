"""Megatron distributed checkpoints: sharded weights and optimizer state, readable at any layout. Knows no name map.

A checkpoint directory holds Megatron's ``torch_dist`` files and ``hf/``, the config and tokenizer of the Hugging Face
model it came from, so that it can be read, resumed and exported without that model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from nemo_kto.checkpoint.hf_export import copy_companions
from nemo_kto.checkpoint.metadata import check_metadata
from nemo_kto.config.locate import HF_SUBDIR, is_megatron_checkpoint
from nemo_kto.distributed.collectives import raise_together
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.errors import CheckpointError
from nemo_kto.gpt.live import parameters_settled, require_policy
from nemo_kto.gpt.network import unwrap

_PREFIX = "model."  # NeMo 1.x's prefix of Megatron GPT weights
_COMMON = "common"
# FP8 scales of Transformer Engine's modules, empty here: kept out, so that checkpoints fit with and without it
_EXTRA_STATE = "_extra_state"
_T = TypeVar("_T")
_MAX_REASON = 300  # characters; a missing key comes with the list of all others


def save_model(
    chunks: Sequence[nn.Module], hf_source_dir: str | Path, out_dir: str | Path, groups: ParallelGroups
) -> None:
    """Write the weights alone. Every rank calls it; ``out_dir`` must be on a file system that all ranks share."""
    save(chunks, None, {}, hf_source_dir, out_dir, groups)


def load_model(chunks: Sequence[nn.Module], ckpt_dir: str | Path, groups: ParallelGroups) -> None:
    """Read the weights alone, at this layout, into the live parameters.

    Raises:
        CheckpointError: not a checkpoint, or its tensors do not fit this model.
    """
    load(chunks, None, ckpt_dir, groups)


def save(
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None,
    common: Mapping[str, Any],
    hf_source_dir: str | Path,
    out_dir: str | Path,
    groups: ParallelGroups,
) -> None:
    """Write weights, optimizer state and ``common`` to a new directory, which appears only when it is whole.

    Args:
        chunks: model chunks of this rank.
        optimizer: Megatron's optimizer, or None to save weights alone.
        common: state that is equal on all ranks: plain numbers, strings, lists, dicts and tensors.
        hf_source_dir: directory whose config and tokenizer go along.
        out_dir: the checkpoint; must not exist.
        groups: the layout.

    Raises:
        CheckpointError: ``out_dir`` exists or cannot be written.
    """
    require_policy(chunks, "saving a checkpoint")
    target = Path(out_dir)
    partial = target.with_name(f"{target.name}.partial")
    _on_first_rank(lambda: _make_empty(target, partial))
    with parameters_settled(chunks):
        state = {**_sharded_state(chunks, optimizer, groups, is_loading=False), _COMMON: dict(common)}
        _on_all_ranks(lambda: dist_checkpointing.save(state, str(partial)), f"{partial} cannot be written")
    _on_first_rank(lambda: _publish(Path(hf_source_dir), partial, target))


def load(
    chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, ckpt_dir: str | Path, groups: ParallelGroups
) -> dict[str, Any]:
    """Read weights, and optimizer state where an optimizer is given, in place. The layout may differ from the saver's.

    Returns:
        ``common`` as it was saved.

    Raises:
        CheckpointError: not a checkpoint, or its tensors do not fit this model.
    """
    path = Path(ckpt_dir)
    raise_together(None if is_megatron_checkpoint(path) else _not_a_checkpoint(path), dist.group.WORLD)
    template = _sharded_state(chunks, optimizer, groups, is_loading=True)

    def fill() -> dict[str, Any]:
        check_metadata(path)
        state = dist_checkpointing.load(template, str(path))
        for number, chunk in enumerate(chunks):
            weights = {name.removeprefix(_PREFIX): value for name, value in state[f"model{number}"].items()}
            missing, unexpected = unwrap(chunk).load_state_dict(weights, strict=False)
            absent = [name for name in missing if not name.endswith(_EXTRA_STATE)]
            if absent or unexpected:
                raise KeyError(f"missing {absent}, unexpected {unexpected}")
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
        common: dict[str, Any] = state.get(_COMMON, {})
        return common

    saver = "another model" if optimizer is None else "another model or model.optim.name"
    return _on_all_ranks(fill, f"{path} is damaged, or was saved by {saver}")


def _not_a_checkpoint(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is not a Megatron distributed checkpoint: it holds no metadata.json")


def _sharded_state(
    chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, groups: ParallelGroups, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {
        # Megatron's default when this is absent is a format that 0.16 can no longer write
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.dp,
    }
    state: dict[str, Any] = {
        f"model{number}": {
            name: tensor
            for name, tensor in unwrap(chunk).sharded_state_dict(prefix=_PREFIX, metadata=metadata).items()
            if not name.endswith(_EXTRA_STATE)
        }
        for number, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        weights = {key: value for part in state.values() for key, value in part.items()}
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return state


def _make_empty(target: Path, partial: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target} exists: remove it or choose another directory")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot create {partial}: {error.strerror}") from error


def _publish(hf_source: Path, partial: Path, target: Path) -> None:
    try:
        (partial / HF_SUBDIR).mkdir()
        shutil.copy2(hf_source / "config.json", partial / HF_SUBDIR)
        copy_companions(hf_source, partial / HF_SUBDIR)
        partial.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be completed: {error}") from error


def _on_all_ranks(action: Callable[[], _T], what_failed: str) -> _T:
    """Run what Megatron does on all ranks; whatever it raises over a checkpoint is one error on all of them.

    torch's CheckpointException is no Exception; it holds what the single ranks raised.
    """
    failure: CheckpointError | None = None
    try:
        result = action()
    except (Exception, CheckpointException) as error:
        cause = next((e for e, _ in error.failures.values()), error) if hasattr(error, "failures") else error
        reason = " ".join(str(cause).split())
        reason = reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}..."
        failure = CheckpointError(f"{what_failed}: {type(cause).__name__}: {reason}")
        failure.__cause__ = error
    raise_together(failure, dist.group.WORLD)
    return result


def _on_first_rank(action: Callable[[], None]) -> None:
    """Run ``action`` on world rank 0; every rank waits, and raises if it did."""
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as raised:
            error = raised
    raise_together(error, dist.group.WORLD)
