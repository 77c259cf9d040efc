"""Weights and optimizer state in Megatron's sharded form: what is saved, and the template of what is loaded.

A network with adapters has two parts that are kept apart: its base, under the names it has without them, and them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.gpt.lora import GATED, low_ranks
from nemo_kto.gpt.network import ADAPTERS, unwrap

PREFIX = "model."
"""NeMo 1.x's prefix of Megatron GPT weights."""
# FP8 scales of Transformer Engine's modules, empty here: kept out, so that checkpoints fit with and without it
EXTRA_STATE = "_extra_state"


class Part(Enum):
    """What of a network a checkpoint is about."""

    NETWORK = "weights"
    ADAPTERS = "adapters"


def sharded_state(
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None,
    groups: ParallelGroups,
    *,
    part: Part = Part.NETWORK,
    is_loading: bool,
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
        f"model{number}": _adapters(chunk, groups) if part is Part.ADAPTERS else _network(chunk, metadata)
        for number, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        weights = {key: value for chunk in state.values() for key, value in chunk.items()}
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return state


def _network(chunk: nn.Module, metadata: Mapping[str, Any]) -> dict[str, Any]:
    whole = unwrap(chunk).sharded_state_dict(prefix=PREFIX, metadata=metadata)
    return {name: tensor for name, tensor in whole.items() if not name.endswith(EXTRA_STATE)}


def _adapters(chunk: nn.Module, groups: ParallelGroups) -> dict[str, Any]:
    """Halves by names that count layers over all stages: which layers have any is the config's choice."""
    found: dict[str, Any] = {}
    for layer, name, adapter in low_ranks([chunk]):
        prefix = adapter_key(layer, name, "")
        halves = make_sharded_tensors_for_checkpoint(
            dict(adapter.named_parameters()),
            prefix,
            {"a": 1} if adapter.is_row else {"b": 0},
            tp_group=groups.tp,
            dp_cp_group=groups.dp,
        )
        if name == GATED:
            halves[f"{prefix}b"] = apply_swiglu_sharded_factory(halves[f"{prefix}b"], ())
        found |= halves
    return found


def adapter_key(layer: int, linear: str, half: str) -> str:
    """Name of a half (``a`` or ``b``) in a checkpoint; whole, the rows of B are as Megatron has them on one rank."""
    return f"lora.{layer}.{linear}.{half}"


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


def take_over(chunks: Sequence[nn.Module], state: dict[str, Any], part: Part = Part.NETWORK) -> None:
    """Put loaded weights into the live parameters, in place.

    Raises:
        KeyError: weights are missing or left over.
    """
    for number, chunk in enumerate(chunks):
        if part is Part.ADAPTERS:
            # what asks for nothing is left out of what is loaded: a pipeline stage may have no adapters
            _fill_adapters(chunk, state.get(f"model{number}", {}))
            continue
        weights = {name.removeprefix(PREFIX): value for name, value in state[f"model{number}"].items()}
        missing, unexpected = unwrap(chunk).load_state_dict(weights, strict=False)
        absent = [name for name in missing if not name.endswith(EXTRA_STATE) and f".{ADAPTERS}" not in name]
        if absent or unexpected:
            raise KeyError(f"missing {absent}, unexpected {unexpected}")


def _fill_adapters(chunk: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for layer, name, adapter in low_ranks([chunk]):
        for half, parameter in adapter.named_parameters():
            parameter.data.copy_(weights[adapter_key(layer, name, half)])
