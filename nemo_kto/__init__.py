"""KTO alignment of Megatron GPT models on NVIDIA's current stack."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["MegatronGPTKTOModel", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the model class on first use: it pulls in torch, Megatron and NeMo."""
    if name == "MegatronGPTKTOModel":
        from nemo_kto.training.kto_model import MegatronGPTKTOModel

        return MegatronGPTKTOModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
