"""Real Megatron-Core on a machine without CUDA, over gloo. Does nothing where CUDA is present.

The only file that patches anything. Two things stand between Megatron 0.16 and a CPU: string constants in its code
("cuda" as a device, "torch.cuda.FloatTensor" in type assertions) and a few ``torch.cuda`` calls that can only raise
without a GPU. An import hook rewrites the constants as Megatron's modules are loaded, which costs nothing at run time,
and the calls get CPU equivalents. Nothing outside ``megatron.core`` sees rewritten code.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import CodeType, ModuleType
from typing import Any

_MEGATRON = "megatron.core"
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


def install() -> bool:
    """Make ``megatron.core`` importable and usable on CPU. Call before its first import; later calls are free.

    Returns:
        Whether this process now runs Megatron on CPU.

    Raises:
        RuntimeError: Megatron was imported first, so its constants can no longer be rewritten.
    """
    import torch

    if torch.cuda.is_available():
        return False
    if any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        return True
    if f"{_MEGATRON}.parallel_state" in sys.modules:
        raise RuntimeError("nemo_kto.cpu_backend.install() must run before megatron.core is imported")
    sys.meta_path.insert(0, _MegatronFinder())
    _keep_freed_memory()
    for name, stand_in in _stand_ins().items():
        setattr(torch.cuda, name, stand_in)
    torch.Tensor.cuda = _identity  # type: ignore[method-assign, assignment]
    return True


def patched_names() -> list[str]:
    """What :func:`install` replaces, for people to read."""
    return ["device names in megatron.core", *(f"torch.cuda.{name}" for name in _stand_ins()), "torch.Tensor.cuda"]


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one.

    By default every large tensor is mapped anew, and unmapped again: a step then spends its time in page faults, some
    2.5 s of system time per GB on a virtual machine. Left alone where the user has tuned the allocator.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20)):
            mallopt(parameter, value)


def _stand_ins() -> dict[str, Callable[..., Any]]:
    """CPU equivalents of the ``torch.cuda`` calls Megatron makes.

    Each is a function object of its own: torch._dynamo refuses two names for one object.
    """
    import torch

    cpu = torch.device("cpu")

    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    return {
        "current_device": lambda: cpu,
        "set_device": lambda *_args, **_kwargs: None,
        "synchronize": lambda *_args, **_kwargs: None,
        "manual_seed": manual_seed,
        "get_rng_state": lambda *_args, **_kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *_args, **_kwargs: torch.set_rng_state(state),
    }


def _identity(tensor: Any, *_args: Any, **_kwargs: Any) -> Any:
    return tensor


def _rewrite(constant: Any) -> Any:
    """Replace device constants, through nested code objects and tuples."""
    if isinstance(constant, str):
        return _CONSTANTS.get(constant, constant)
    if isinstance(constant, tuple):
        return tuple(_rewrite(item) for item in constant)
    if isinstance(constant, CodeType):
        return constant.replace(co_consts=_rewrite(constant.co_consts))
    return constant


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Any:
    import torch

    return torch.get_rng_state()


def _set_rng_state(new_state: Any, device: Any = None, graph_safe: bool = False) -> None:
    import torch

    torch.set_rng_state(new_state)


class _MegatronLoader(importlib.machinery.SourceFileLoader):
    """Loads one Megatron module with its device constants rewritten."""

    def get_code(self, fullname: str) -> CodeType | None:
        code = super().get_code(fullname)
        return None if code is None else _rewrite(code)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if module.__name__ == f"{_MEGATRON}.jit":
            module.disable_jit_fuser()  # torch.compile at import time costs seconds and gains nothing here
        elif module.__name__ == f"{_MEGATRON}.tensor_parallel.random":
            module._get_cuda_rng_state = _get_rng_state  # type: ignore[attr-defined]
            module._set_cuda_rng_state = _set_rng_state  # type: ignore[attr-defined]


class _MegatronFinder(importlib.abc.MetaPathFinder):
    """Hands modules under ``megatron.core`` to :class:`_MegatronLoader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{_MEGATRON}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _MegatronLoader(spec.loader.name, spec.loader.path)
        return spec
