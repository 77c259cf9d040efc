"""A tiny random model, its tokenizer and a toy data set, made from nothing: for CI and a first look."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

WORDS = (
    "the film is a quiet slow bright dull moving clumsy warm tired story about two people who leave the old town and "
    "never look back with music that is lovely awful great boring and a cast of actors i liked hated and forgot "
    "product works breaks fast battery lasts long screen looks sharp cheap sound price good bad"
).split()
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
}


def make_tokenizer(out: Path) -> int:
    """Write a byte-level BPE tokenizer with a chat template to ``out`` and return its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=399,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([" ".join(WORDS), " " + " ".join(WORDS)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)
    return len(fast)


def make_model(out: Path, family: str = "llama", seed: int = 0, dtype: str = "float32", **sizes: object) -> Path:
    """Write a random ``family`` model with its tokenizer to ``out`` as a Hugging Face directory.

    Args:
        out: directory to make.
        family: a key of ``FAMILIES``.
        seed: of the weights.
        dtype: of the stored weights.
        sizes: config entries over ``SIZES``, such as ``tie_word_embeddings=True`` or ``num_hidden_layers=2``.

    Returns:
        ``out``.
    """
    import torch
    import transformers

    out.mkdir(parents=True, exist_ok=True)
    vocab = make_tokenizer(out)
    name = FAMILIES[family]
    config_class = getattr(transformers, name.replace("ForCausalLM", "Config"))
    settings = {"vocab_size": vocab, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, **SIZES, **sizes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, name)(config_class(**settings))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.dim() == 1:  # norms and biases start at 1 and 0, where a mix-up would not show
                    centre = 0.0 if parameter_name.endswith("bias") else 1.0
                    parameter.copy_(centre + 0.1 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(out)
    return out


def make_records(path: Path, count: int, seed: int = 0) -> Path:
    """Write ``count`` KTO records of random words; the label says whether a praising word ends the response."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            good = rng.random() < 0.5
            prompt = "review: " + " ".join(rng.choices(WORDS, k=rng.randint(2, 6))) + f" {i}"
            tail = rng.choice(["lovely great good", "bright warm good"] if good else ["awful bad", "boring dull bad"])
            response = " " + " ".join(rng.choices(WORDS, k=rng.randint(2, 14))) + " " + tail
            label = "chosen" if good else "rejected"
            file.write(json.dumps({"prompt": prompt, "response": response, "preference": label}) + "\n")
    return path


def main() -> None:
    """Write model, train.jsonl and heldout.jsonl under the directory given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    make_model(out / "model", tie_word_embeddings=True)
    make_records(out / "train.jsonl", 400, seed=1)
    make_records(out / "heldout.jsonl", 64, seed=2)


if __name__ == "__main__":
    main()
