"""In a process of its own: asks torch and Megatron what they see and what they would use.

As a program it asks for the devices alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nemo_kto.doctor.children import reason, voice


def answer(say: voice, topics: Sequence[Callable[[], dict[str, Any]]]) -> None:
    """Say ``topic`` with its facts or its error, for each topic."""
    for topic in topics:
        name = topic.__name__[1:]
        try:
            say(topic=name, **topic())
        except BaseException as error:  # drivers and extensions raise anything
            say(topic=name, error=reason(error))


def _torch() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    nccl = None
    if dist.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "gloo": dist.is_gloo_available(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _devices() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        why = ""
        if torch.version.cuda is not None:
            try:
                torch.cuda.init()
            except Exception as error:
                why = reason(error)
        return {"devices": [], "why_none": why}
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "index": index,
                "name": properties.name,
                "capability": [properties.major, properties.minor],
                "memory_bytes": total,
                "free_bytes": free,
                "bf16": torch.cuda.is_bf16_supported(),
            }
        )
    return {"devices": found, "why_none": ""}


def _megatron() -> dict[str, Any]:
    from nemo_kto import cpu_backend

    patched = cpu_backend.install()
    import megatron.core.optimizer as optimizers
    import torch
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.optimizer import optimizer

    return {
        "optimizer": f"{optimizers.Adam.__module__}.{optimizers.Adam.__qualname__}",
        "layer_norm": f"{gpt_layer_specs.LNImpl.__module__}.{gpt_layer_specs.LNImpl.__qualname__}",
        "multi_tensor": optimizer.multi_tensor_applier.__module__,
        "has_transformer_engine": gpt_layer_specs.HAVE_TE,
        "has_apex": gpt_layer_specs.HAVE_APEX,
        "sdpa": {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "memory_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        },
        "cpu_patches": cpu_backend.patched_names() if patched else [],
    }


def _network() -> dict[str, Any]:
    """The parts that a training is built from."""
    from nemo_kto import cpu_backend

    cpu_backend.install()
    from nemo_kto.gpt.attention import SDPAttention
    from nemo_kto.gpt.build import has_transformer_engine
    from nemo_kto.gpt.norm import RMSNorm

    ours = not has_transformer_engine()
    name = "transformer_engine.pytorch"
    return {
        "layers": "nemo_kto on Megatron's local layers" if ours else name,
        "norm": f"{RMSNorm.__module__}.{RMSNorm.__qualname__}" if ours else f"{name}.RMSNorm",
        "attention": f"{SDPAttention.__module__}.{SDPAttention.__qualname__}"
        if ours
        else f"{name}.DotProductAttention",
    }


TOPICS = (_torch, _devices, _megatron, _network)


if __name__ == "__main__":
    answer(voice(), TOPICS[:2])
