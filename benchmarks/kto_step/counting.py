"""Counts what a step does: rows through the network, floating-point operations, bytes handed to collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.kto_step.flops import Pass

Reader = Callable[[tuple[Any, ...], dict[str, Any]], Pass]


class Watch:
    """Notes every run of rows through a network, or several.

    Args:
        networks: their forwards are watched.
        reader: what the arguments of a forward hold.
    """

    def __init__(self, networks: Iterable[nn.Module], reader: Reader) -> None:
        self._passes: list[Pass] = []
        self._reader = reader
        for network in networks:
            network.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._passes.append(self._reader(args, kwargs))

    def take(self) -> list[dict[str, Any]]:
        """What was noted since the last call."""
        taken, self._passes = self._passes, []
        return [asdict(run) for run in taken]


def padded_pass(rows: int, length: int, real_tokens: int, positions: float) -> Pass:
    """Rows that are padded to one length."""
    tokens = rows * length
    return Pass(tokens, tokens - real_tokens, rows * length**2, positions, torch.is_grad_enabled())


class Counting:
    """Counts operations and collective bytes between :meth:`start` and :meth:`stop`. Slow: not for timed steps."""

    def __init__(self) -> None:
        self._flops: FlopCounterMode | None = None
        self._collectives = _CollectiveBytes()

    def start(self) -> None:
        """From here on."""
        self._collectives.total = 0
        self._flops = FlopCounterMode(display=False, custom_mapping=dict(_missing_formulas()))
        self._flops.__enter__()
        self._collectives.__enter__()

    def stop(self) -> dict[str, float]:
        """``flops`` and ``collective_bytes`` since :meth:`start`; empty if it was not called."""
        if self._flops is None:
            return {}
        self._collectives.__exit__(None, None, None)
        self._flops.__exit__(None, None, None)
        counted, self._flops = self._flops, None
        return {"flops": counted.get_total_flops(), "collective_bytes": self._collectives.total}


def _missing_formulas() -> Iterator[tuple[Any, Callable[..., int]]]:
    """Operators that torch 2.13's counter has no formula for, all of them used on CPU."""
    aten = torch.ops.aten
    yield aten.addmm_, _addmm
    yield aten._scaled_dot_product_flash_attention_for_cpu, _attention
    yield aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward
    if torch.backends.mkldnn.is_available():
        yield torch.ops.mkldnn._linear_pointwise, _linear


def _addmm(_: Any, left: Any, right: Any, *__: Any, out_shape: Any = None, **___: Any) -> int:
    return int(2 * left[0] * left[1] * right[1])


def _linear(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(2 * torch.Size(x).numel() * weight[0])


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


class _CollectiveBytes(TorchDispatchMode):
    """Adds up the payloads of collectives: of each the larger of what goes in and what comes out, on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and _group_size(args) > 1:
            self.total += max((_num_bytes(argument) for argument in args), default=0)
        return func(*args, **(kwargs or {}))


def _group_size(args: Any) -> int:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(argument).size()
            except RuntimeError:  # the reduction operator, which is an object of this kind too
                continue
    return 1


def _num_bytes(argument: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(argument) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
