"""Sample continuations of held-out prompts from two models and compare their mean VADER sentiment (-1 to 1)."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

BATCH = 64


def read_prompts(path: Path, count: int) -> list[str]:
    """The first ``count`` prompts of a record file."""
    with path.open(encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    return prompts[:count]


def sample(model_dir: Path, prompts: list[str], max_new_tokens: int, seed: int) -> list[str]:
    """One sampled continuation per prompt, at temperature 1 from the whole vocabulary, without the prompt.

    Args:
        model_dir: Hugging Face directory.
        prompts: plain text.
        max_new_tokens: at most this many tokens each.
        seed: the same for both models, so that they draw the same random numbers.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device).eval()
    texts: list[str] = []
    torch.manual_seed(seed)
    for start in range(0, len(prompts), BATCH):
        batch = tokenizer(prompts[start : start + BATCH], return_tensors="pt", padding=True).to(device)
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def compounds(texts: list[str]) -> list[float]:
    """VADER's compound score of each text: -1 most negative, 1 most positive."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


def summarize(texts: list[str]) -> dict[str, float]:
    """Mean sentiment and its standard error."""
    scores = compounds(texts)
    return {"vader": statistics.fmean(scores), "standard_error": statistics.stdev(scores) / math.sqrt(len(scores))}


def compare(before: Path, after: Path, prompts: list[str], max_new_tokens: int = 24, seed: int = 1234) -> dict:
    """Sample from both models and return ``{"before", "after", "rows"}``."""
    first = sample(before, prompts, max_new_tokens, seed)
    second = sample(after, prompts, max_new_tokens, seed)
    rows = [
        {"prompt": prompt, "before": old, "after": new}
        for prompt, old, new in zip(prompts, first, second, strict=True)
    ]
    return {"before": summarize(first), "after": summarize(second), "count": len(rows), "rows": rows}


def main() -> None:
    """Compare two directories and write the result as JSON."""
    parser = argparse.ArgumentParser(description="VADER sentiment of two models' continuations")
    parser.add_argument("--before", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--after", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--data", type=Path, required=True, help="record file that holds the prompts")
    parser.add_argument("--count", type=int, default=256, help="number of prompts (default: 256)")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="tokens per continuation (default: 24)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    prompts = read_prompts(options.data, options.count)
    result = compare(options.before, options.after, prompts, options.max_new_tokens)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    for side in ("before", "after"):
        print(f"VADER {side}: {result[side]['vader']:+.3f} (standard error {result[side]['standard_error']:.3f})")


if __name__ == "__main__":
    main()
