"""LoRA on Megatron's linear layers: y = W x + scale B A x, with A and B sharded like the layer that they belong to.

Hu et al., arXiv 2106.09685. Between A and B lies an activation of ``rank`` channels, and every collective that tensor
or sequence parallelism needs is taken there, never on hidden-sized tensors:

| layer | A [rank, in] | B [out, rank] | forward, between A and B | a partial gradient, summed by Megatron |
|---|---|---|---|---|
| column-parallel (qkv, fc1) | replicated | rows sharded | none; SP: gather along the sequence | SP: A |
| row-parallel (proj, fc2) | columns sharded | replicated | all-reduce; SP: reduce-scatter | SP: B |

Adapters are attached by a forward hook and live beside the layers that they change, so those keep their names, their
checkpoints and their kernels; Megatron's local layers and Transformer Engine's look alike from here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from nemo_kto.config.lora import LoraSpec
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.gpt.network import ADAPTERS, unwrap

_NAME = ADAPTERS.removesuffix(".")
_PARENTS = {"linear_qkv": "self_attention", "linear_proj": "self_attention", "linear_fc1": "mlp", "linear_fc2": "mlp"}
_ROW_PARALLEL = ("linear_proj", "linear_fc2")
GATED = "linear_fc1"
"""A rank's rows of this layer are its part of the gate, then its part of up."""
_NORMAL_STD = 0.2  # NeMo's


class LowRank(nn.Module):
    """The low-rank product of one linear layer. Float32 parameters, computed in the activations' dtype.

    Args:
        weight: of the layer, [out / TP, in] or, row-parallel, [out, in / TP].
        rank: inner dimension.
        scale: factor of the product.
        dropout: on the input, while training.
        is_row: whether the layer is row-parallel.
        sequence_parallel: whether activations outside the layer are sharded along the sequence.
        tp: the tensor-parallel group.

    Attributes:
        a: [rank, in], or [rank, in / TP] for a row-parallel layer.
        b: [out / TP, rank], or [out, rank] for a row-parallel layer.
    """

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        *,
        scale: float,
        dropout: float,
        is_row: bool,
        sequence_parallel: bool,
        tp: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.zeros(rank, columns, dtype=torch.float32, device=weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, dtype=torch.float32, device=weight.device))
        self.scale, self.dropout, self.is_row = scale, dropout, is_row
        self._sequence_parallel, self._tp = sequence_parallel, tp
        sharded, whole = (self.a, self.b) if is_row else (self.b, self.a)
        set_tensor_model_parallel_attributes(sharded, True, 1 if is_row else 0, 1)
        whole.sequence_parallel = sequence_parallel  # each rank sees its own positions: its gradient is partial

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output.

        Args:
            x: the layer's input, [s, b, in] ([s / TP, b, in] under sequence parallelism), or [s, b, in / TP] where it
                is row-parallel.

        Returns:
            [s, b, out / TP], or, row-parallel, [s, b, out] ([s / TP, b, out] under sequence parallelism).
        """
        if self.training and self.dropout > 0.0:
            with self._random_stream():
                x = F.dropout(x, self.dropout)
        inner = F.linear(x, self.a.to(x.dtype))
        return F.linear(self._across_ranks(inner) * self.scale, self.b.to(x.dtype))

    def _across_ranks(self, inner: Tensor) -> Tensor:
        """The only exchange: of ``rank`` channels."""
        result: Tensor
        if self.is_row:
            reduce = (
                reduce_scatter_to_sequence_parallel_region
                if self._sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            result = reduce(inner, group=self._tp)
        elif self._sequence_parallel:
            result = gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=self._tp)
        else:
            result = copy_to_tensor_model_parallel_region(inner, group=self._tp)
        return result

    def _random_stream(self) -> AbstractContextManager[None]:
        """TP ranks need the same noise where they hold the same input, and different noise where they do not."""
        if self.is_row or self._sequence_parallel:
            return get_cuda_rng_tracker().fork()
        return nullcontext()


class Adapters(nn.ModuleDict):
    """The adapters of one decoder layer, by the name of their linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing: to Megatron a layer has the weights of its base, and adapters are saved apart."""
        return {}


class _Added:
    """Forward hook of a linear layer that adds its low-rank product."""

    def __init__(self, adapters: Adapters, name: str) -> None:
        self._adapters, self._name = adapters, name

    def __call__(self, linear: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._adapters.enabled:
            return output
        result, bias = output
        return result + self._adapters[self._name](_normed(linear, args[0])), bias


def _normed(linear: nn.Module, x: Tensor) -> Tensor:
    """Transformer Engine holds the norm before a linear layer inside it; A takes what comes out of that norm."""
    weight = getattr(linear, "layer_norm_weight", None)
    if weight is None:
        return x
    if getattr(linear, "zero_centered_gamma", False):
        weight = weight + 1
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), linear.eps)


def attach(chunks: Sequence[nn.Module], spec: LoraSpec, groups: ParallelGroups, *, dropout: float = 0.0) -> None:
    """Freeze a network and add adapters to it, all zero, before it is wrapped in DDP.

    Args:
        chunks: from ``build_gpt``.
        spec: which layers, and their ranks.
        groups: the layout of ``chunks``.
        dropout: on the adapters' input, while training.
    """
    for chunk in chunks:
        network = unwrap(chunk)
        network.requires_grad_(False)
        for layer in network.decoder.layers:
            if spec.has(layer.layer_number - 1):
                _attach_to(layer, spec, groups, dropout)
        if network.pre_process and network.config.recompute_granularity == "full":
            # a recomputed block passes gradients on only if one of its inputs wants any, and nothing before does
            network.embedding.register_forward_hook(_wants_gradient)


def _attach_to(layer: nn.Module, spec: LoraSpec, groups: ParallelGroups, dropout: float) -> None:
    adapters = Adapters()
    layer.add_module(_NAME, adapters)
    for name, rank in spec.ranks.items():
        linear = getattr(getattr(layer, _PARENTS[name]), name)
        adapters[name] = LowRank(
            linear.weight,
            rank,
            scale=spec.scale,
            dropout=dropout,
            is_row=name in _ROW_PARALLEL,
            sequence_parallel=layer.config.sequence_parallel,
            tp=groups.tp,
        )
        linear.register_forward_hook(_Added(adapters, name))


def _wants_gradient(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def low_ranks(chunks: Iterable[nn.Module]) -> Iterator[tuple[int, str, LowRank]]:
    """(decoder layer over all stages from 0, linear layer, adapter) of every adapter of this rank, in order."""
    for chunk in chunks:
        for layer in unwrap(chunk).decoder.layers:
            for name, adapter in getattr(layer, _NAME, {}).items():
                yield layer.layer_number - 1, name, adapter


@torch.no_grad()
def initialize(
    chunks: Iterable[nn.Module], groups: ParallelGroups, *, seed: int, column_init: str, row_init: str
) -> None:
    """Fill the adapters with numbers that do not depend on the layout.

    Args:
        chunks: with adapters.
        groups: their layout.
        seed: of the numbers.
        column_init: of every A: ``xavier``, ``normal`` or ``zero``.
        row_init: of every B; ``zero`` starts from the base model's outputs.
    """
    for layer, name, adapter in low_ranks(chunks):
        rank, columns, rows = adapter.a.shape[0], adapter.a.shape[1], adapter.b.shape[0]
        wide = groups.tp_size if adapter.is_row else 1
        high = 1 if adapter.is_row else groups.tp_size
        key = f"{seed}/{layer}/{name}"
        a = _numbers([rank, columns * wide], column_init, f"{key}/a")
        b = _numbers([rows * high, rank], row_init, f"{key}/b")
        fill(adapter, name, a, b, groups)


@torch.no_grad()
def fill(adapter: LowRank, name: str, a: Tensor, b: Tensor, groups: ParallelGroups) -> None:
    """Put this rank's shard of whole matrices into an adapter.

    Args:
        adapter: of linear layer ``name``.
        name: a value of ``LINEARS``.
        a: [rank, in], unsharded.
        b: [out, rank], unsharded; of ``linear_fc1`` all of the gate's rows lie above those of up.
        groups: the layout.
    """
    if adapter.is_row:
        a = a.chunk(groups.tp_size, dim=1)[groups.tp_rank]
    else:
        blocks = b.chunk(2) if name == GATED else (b,)
        b = torch.cat([block.chunk(groups.tp_size)[groups.tp_rank] for block in blocks])
    adapter.a.copy_(a)
    adapter.b.copy_(b)


def _numbers(shape: list[int], method: str, key: str) -> Tensor:
    if method == "zero":
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]))
    std = math.sqrt(2.0 / sum(shape)) if method == "xavier" else _NORMAL_STD
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def merge(chunks: Iterable[nn.Module]) -> None:
    """Add every low-rank product to the weight of its layer, and empty it: the network computes the same without."""
    for chunk in chunks:
        for layer in unwrap(chunk).decoder.layers:
            for name, adapter in getattr(layer, _NAME, {}).items():
                weight = getattr(getattr(layer, _PARENTS[name]), name).weight
                weight.add_((adapter.scale * (adapter.b @ adapter.a)).to(weight.dtype))
                adapter.b.zero_()


@contextmanager
def adapters_off(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """The network is its base inside the block; adapters are back on leaving, also by an exception."""
    found = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapters)]
    before = [module.enabled for module in found]
    for module in found:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(found, before, strict=True):
            module.enabled = enabled
