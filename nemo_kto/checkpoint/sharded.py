"""Weights and optimizer state in Megatron's sharded form: what is saved, and the template of what is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.gpt.network import unwrap

PREFIX = "model."
"""NeMo 1.x's prefix of Megatron GPT weights."""
# FP8 scales of Transformer Engine's modules, empty here: kept out, so that checkpoints fit with and without it
EXTRA_STATE = "_extra_state"


def sharded_state(
    chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, groups: ParallelGroups, *, is_loading: bool
) -> dict[str, Any]:
    """``model0`` ... and, with an optimizer, ``optimizer``: this rank's shards, named and placed in the whole."""
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
            for name, tensor in unwrap(chunk).sharded_state_dict(prefix=PREFIX, metadata=metadata).items()
            if not name.endswith(EXTRA_STATE)
        }
        for number, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        weights = {key: value for part in state.values() for key, value in part.items()}
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return state


def tensor_keys(state: dict[str, Any]) -> Iterator[str]:
    """Names under which a checkpoint holds the tensors of a state.

    Raises:
        TypeError: the state asks for a pickled object.
    """
    for value in nested_values(state):
        if isinstance(value, ShardedObject):
            raise TypeError(f"{value.key} is a pickled object; only tensors are read")
        if isinstance(value, ShardedTensor | ShardedTensorFactory):
            yield value.key


def take_over(chunks: Sequence[nn.Module], state: dict[str, Any]) -> None:
    """Put loaded weights into the live parameters, in place.

    Raises:
        KeyError: weights are missing or left over.
    """
    for number, chunk in enumerate(chunks):
        weights = {name.removeprefix(PREFIX): value for name, value in state[f"model{number}"].items()}
        missing, unexpected = unwrap(chunk).load_state_dict(weights, strict=False)
        absent = [name for name in missing if not name.endswith(EXTRA_STATE)]
        if absent or unexpected:
            raise KeyError(f"missing {absent}, unexpected {unexpected}")
