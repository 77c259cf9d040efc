"""Tiny random Hugging Face models of every supported kind, and what transformers makes of a batch."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.5,  # not Llama 3.1's numbers: Megatron's own scaling knows no others
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 64,  # short, so that all three bands of channels occur in a tiny head
}
CASES = {
    "llama3": ("llama", {"rope_theta": 5000.0, "rope_scaling": LLAMA3_ROPE}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama_linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}
"""Untied and grouped unless said; hidden 64, 4 heads of 16, 2 key/value heads, an odd vocabulary of 399."""


def make(case: str, folder: Path, **settings: object) -> Path:
    """Write the model of ``CASES[case]`` under ``folder``."""
    family, sizes = CASES[case]
    return tiny.make_model(folder / case, family, **{**sizes, **settings})


def batch(vocab_size: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, S], padded on the right with 0, and the mask [B, S] of what is not padding."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(3, vocab_size, mask.shape, generator=generator) * mask, mask


def hf_logits(
    folder: Path, tokens: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Logits [B, S, V] of transformers, in the model's dtype."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype).eval()
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask.long()).logits
