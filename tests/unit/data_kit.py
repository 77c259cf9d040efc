"""Small data sets, tokenizers and settings for the tests of the data room."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_kto.config.schema import DataConfig, DataFilesConfig
from nemo_kto.data.store import RowChunk, StoreWriter, TokenStore
from nemo_kto.data.tokenize import build_store


def data_config(cache_dir: Path, **changes: Any) -> DataConfig:
    """Defaults of conf/gpt_kto.yaml, in-process."""
    settings: dict[str, Any] = {
        "data_prefix": DataFilesConfig([], None),
        "packing": True,
        "seq_length": 1024,
        "shuffle": True,
        "append_eos": True,
        "overlong": "drop",
        "num_workers": 0,
        "tokenize_workers": 1,
        "cache_dir": str(cache_dir),
    }
    return DataConfig(**{**settings, **changes})


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def pair(prompt: Any, response: Any, liked: bool = True) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "preference": "chosen" if liked else "rejected"}


def char_tokenizer(
    out: Path,
    *,
    bos: str | None = None,
    eos: str | None = "$",
    merges: Sequence[tuple[str, str]] = (),
    template: str | None = None,
) -> Path:
    """One token per printable ASCII character: its code. Merged pairs follow from 256 on. BOS comes first if given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {chr(c): c for c in range(32, 127)} | {"<unk>": 0, "\n": 10}
    vocab |= {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("never-there", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token="<unk>")
    fast.chat_template = template
    fast.save_pretrained(out)
    return out


def codes(text: str) -> list[int]:
    return [ord(c) for c in text]


def store_of(tmp_path: Path, records: list[dict], tokenizer: Path, **changes) -> TokenStore:
    data = write_jsonl(tmp_path / "data.jsonl", records)
    return build_store([data], tokenizer, data_config(tmp_path / "cache", **changes))


def rows(store: TokenStore) -> list[tuple[list[int], list[int]]]:
    return [(store.prompt(i).tolist(), store.response(i).tolist()) for i in range(len(store))]


def make_store(
    out: Path, rows: Sequence[tuple[Sequence[int], Sequence[int], bool]], prompt_keys: Sequence[int] = ()
) -> TokenStore:
    """A store of rows (prompt ids, response ids, desirable) without a tokenizer; keys are derived from the ids."""
    out.mkdir(parents=True)
    keys = [[hash(tuple(prompt)) % 2**63, 0] for prompt, _, _ in rows]
    with StoreWriter(out) as writer:
        writer.add(
            RowChunk(
                ids=np.concatenate([np.asarray([*p, *r], np.int32) for p, r, _ in rows]),
                lengths=np.array([len(p) + len(r) for p, r, _ in rows]),
                prompt_lengths=np.array([len(p) for p, _, _ in rows]),
                desirable=np.array([d for _, _, d in rows]),
                record_index=np.arange(len(rows)),
                prompt_keys=np.array([[k, 0] for k in prompt_keys] or keys, np.uint64),
                response_keys=np.array([[hash(tuple(r)) % 2**63, 0] for _, r, _ in rows], np.uint64),
                num_records=len(rows),
                dropped_overlong=0,
                truncated=0,
                boundary_merges=0,
                problems=(),
            )
        )
        writer.finish(["made up"])
    return TokenStore(out)


def random_rows(count: int, seed: int = 0, prompts: int = 10**6) -> list[tuple[list[int], list[int], bool]]:
    """Rows of 1 to 6 + 1 to 9 tokens; a small ``prompts`` makes many rows share one."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prompt = np.random.default_rng(int(rng.integers(prompts))).integers(10, 90, 5).tolist()
        response = rng.integers(10, 90, int(rng.integers(1, 10))).tolist()
        rows.append((prompt, response, bool(rng.random() < 0.5)))
    return rows
