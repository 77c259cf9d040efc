"""Data files and model directories, each with one thing wrong, for test_errors.py."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import tiny

GOOD = {"prompt": "review: the film", "response": " is lovely", "preference": "chosen"}


def make(here: Path, good_model: Path) -> Path:
    """Fill ``here`` with ``model``, ``good.jsonl`` and bad ones; returns it."""
    shutil.copytree(good_model, here / "model")
    tiny.make_records(here / "good.jsonl", 32)
    _bad_data(here)
    _bad_models(here)
    return here


def _bad_data(here: Path) -> None:
    def lines(name: str, *records: object) -> None:
        texts = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (here / name).write_text("\n".join(texts) + "\n")

    lines("not_json.jsonl", GOOD, GOOD, "{'prompt': 1}")
    lines("no_keys.jsonl", GOOD, {"text": "x"})
    lines("pairs.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    lines("label.jsonl", GOOD, {**GOOD, "preference": "good"})
    lines("empty_response.jsonl", {**GOOD, "response": " "})
    lines("chat.jsonl", {**GOOD, "prompt": [{"role": "robot", "content": "x"}], "response": "y"})
    lines("many.jsonl", *[{**GOOD, "preference": i} for i in range(2, 32)])
    lines("two.jsonl", GOOD, {**GOOD, "preference": "rejected", "response": " is bad"})
    lines("long.jsonl", *[{**GOOD, "response": " bad" * 300}] * 9)
    (here / "empty.jsonl").touch()
    (here / "latin.jsonl").write_bytes(json.dumps(GOOD).replace("film", "caf\xe9").encode("latin-1"))
    (here / "cut.jsonl.gz").write_bytes(gzip.compress((here / "good.jsonl").read_bytes())[:-20])
    (here / "broken.parquet").write_bytes(b"PAR1 nothing")
    (here / "data.csv").write_text("prompt,response\n")
    (here / "folder.jsonl").mkdir()


def _bad_models(here: Path) -> None:
    def model(name: str, **config: object) -> Path:
        shutil.copytree(here / "model", here / name)
        values = json.loads((here / name / "config.json").read_text())
        (here / name / "config.json").write_text(json.dumps({**values, **config}))
        return here / name

    model("moe", num_local_experts=8)
    model("bert", model_type="bert")
    model("quantized", quantization_config={"bits": 4})
    model("yarn", rope_parameters={"rope_type": "yarn", "factor": 2.0})
    model("deeper", num_hidden_layers=8)
    (model("garbled") / "config.json").write_text("{")
    for file in model("no_tokenizer").glob("*token*"):
        file.unlink()
    (here / "nothing").mkdir()
    (here / "megatron").mkdir()
    (here / "megatron" / "metadata.json").write_text("{}")
    (here / "a_file").touch()
    earlier = here / "earlier" / "checkpoints" / "step-000007"
    earlier.mkdir(parents=True)
    (earlier / "metadata.json").write_text("{}")
