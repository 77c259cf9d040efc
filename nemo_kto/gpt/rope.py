"""Inverse frequencies of rotary embeddings. Megatron knows Llama 3's scaling only with the numbers of Llama 3.1."""

from __future__ import annotations

import math

import torch

from nemo_kto.config.architecture import Architecture, RopeScaling


def inverse_frequencies(arch: Architecture, device: torch.device) -> torch.Tensor:
    """Angle per position of each pair of channels, [head_dim / 2] float32, radians.

    Written after ``_compute_default_rope_parameters``, ``_compute_linear_scaling_rope_parameters`` and
    ``_compute_llama3_parameters`` of ``transformers.modeling_rope_utils``.
    """
    channels = torch.arange(0, arch.head_dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float32)
    frequencies = 1.0 / (arch.rope_theta ** (channels / arch.head_dim))
    scaling = arch.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3(frequencies, scaling)


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Slow channels are stretched by ``factor``, fast ones stay, those between are blended by their wavelength."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies
