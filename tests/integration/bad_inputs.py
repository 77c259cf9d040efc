"""Data files, configs and model directories, each with one thing wrong, for the tests of errors."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import tiny
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

GOOD = {"prompt": "review: the film", "response": " is lovely", "preference": "chosen"}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def make(here: Path, good_model: Path) -> Path:
    """Fill ``here`` with ``model``, ``good.jsonl`` and bad ones; returns it."""
    shutil.copytree(good_model, here / "model")
    tiny.make_records(here / "good.jsonl", 32)
    _bad_lines(here)
    _bad_files(here)
    _bad_configs(here)
    _bad_tokenizers(here)
    _bad_weights(here)
    _odd_places(here)
    return here


def _bad_lines(here: Path) -> None:
    def lines(name: str, *records: object) -> None:
        texts = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (here / f"{name}.jsonl").write_text("\n".join(texts) + "\n")

    user, assistant = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    lines("not_json", GOOD, GOOD, "{'prompt': 1}")
    lines("nan", '{"prompt": "a", "response": "b", "preference": NaN}')
    lines("doubled", '{"prompt": "a", "prompt": "b", "response": "c", "preference": 1}')
    lines("deep", "[" * 100_000)
    lines("no_object", GOOD, ["a", "b"])
    lines("one_array", json.dumps([GOOD, GOOD], indent=1))
    lines("no_keys", GOOD, {"text": "x"})
    lines("pairs", {"prompt": "a", "chosen": "b", "rejected": "c"})
    lines("mixed", {"prompt": "a", "response": "b", "label": True})
    lines("label", GOOD, {**GOOD, "preference": "good"})
    lines("rating", GOOD, {**GOOD, "preference": 5})
    lines("empty_prompt", {**GOOD, "prompt": "\t"})
    lines("empty_response", {**GOOD, "response": " "})
    lines("number", {**GOOD, "prompt": 7})
    lines("half", '{"prompt": "a \\ud83d", "response": "b", "preference": 1}')
    lines("chat", {**GOOD, "prompt": [{"role": "robot", "content": "x"}], "response": "y"})
    lines("no_content", {**GOOD, "prompt": [{"role": "user"}], "response": "y"})
    lines("tools", {**GOOD, "prompt": [{**user, "tool_calls": [1]}]})
    lines("last_word", {**GOOD, "prompt": [user, assistant]})
    lines("list_response", {**GOOD, "response": [assistant]})
    lines("user_response", {**GOOD, "prompt": [user], "response": [user]})
    lines("many", *[{**GOOD, "preference": i} for i in range(2, 32)])
    lines("two", GOOD, {**GOOD, "preference": "rejected", "response": " is bad"})
    lines("long", *[{**GOOD, "response": " bad" * 300}] * 9)
    lines("blank", "", "  ", "")
    lines("talk", *[{**GOOD, "prompt": [user]}] * 8)


def _bad_files(here: Path) -> None:
    good = (here / "good.jsonl").read_bytes()
    (here / "empty.jsonl").touch()
    (here / "latin.jsonl").write_bytes(
        json.dumps(GOOD, ensure_ascii=False).replace("film", "caf\xe9").encode("latin-1")
    )
    (here / "wide.jsonl").write_bytes(json.dumps(GOOD).encode("utf-16"))
    (here / "cut.jsonl.gz").write_bytes(gzip.compress(good)[:-20])
    (here / "plain.jsonl.gz").write_bytes(good)
    (here / "packed.jsonl").write_bytes(gzip.compress(good))
    (here / "broken.parquet").write_bytes(b"PAR1 nothing")
    (here / "data.csv").write_text("prompt,response\n")
    (here / "folder.jsonl").mkdir()
    (here / "dangling.jsonl").symlink_to(here / "nowhere.jsonl")
    (here / "locked.jsonl").write_bytes(good)
    (here / "locked.jsonl").chmod(0)

    def table(name: str, **columns: list[Any]) -> None:
        parquet.write_table(pyarrow.table(columns), here / f"{name}.parquet")

    table("columns", text=["a"], score=[1.0])
    table("rows", prompt=["a", "b"], response=["c", None], preference=["chosen", "rejected"])
    table("no_rows", prompt=pyarrow.array([], pyarrow.string()))
    (here / "cut.parquet").write_bytes((here / "rows.parquet").read_bytes()[:-30])


def _model(here: Path, name: str, **config: object) -> Path:
    """A copy of the good model, with entries of config.json changed; None removes one."""
    shutil.copytree(here / "model", here / name)
    values = {**json.loads((here / name / "config.json").read_text()), **config}
    kept = {key: value for key, value in values.items() if value is not None}
    (here / name / "config.json").write_text(json.dumps(kept))
    return here / name


def _bad_configs(here: Path) -> None:
    _model(here, "moe", num_local_experts=8)
    _model(here, "bert", model_type="bert")
    _model(here, "quantized", quantization_config={"bits": 4})
    _model(here, "yarn", rope_parameters={"rope_type": "yarn", "factor": 2.0})
    _model(here, "deeper", num_hidden_layers=8)
    _model(here, "no_layers", num_hidden_layers=0)
    _model(here, "no_vocabulary", vocab_size=None)
    (_model(here, "garbled") / "config.json").write_text("{")
    (_model(here, "listed") / "config.json").write_text("[]")
    (here / "garbled.yaml").write_text("defaults: [gpt_kto, _self_]\nmodel: {seed: 1\n")
    (here / "alone.yaml").write_text("model: {seed: 1}\n")
    (here / "stray.yaml").write_text("defaults: [gpt_kto, _self_]\nmodel: {sead: 1}\n")


def _bad_tokenizers(here: Path) -> None:
    for file in _model(here, "no_tokenizer").glob("*token*"):
        file.unlink()
    (_model(here, "garbled_tokenizer") / "tokenizer.json").write_text('{"version": "1.0", "model":')
    (_model(here, "empty_tokenizer") / "tokenizer.json").write_bytes(b"")

    def edited(name: str, change: Callable[[dict[str, Any]], None]) -> None:
        file = _model(here, name) / "tokenizer_config.json"
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))

    edited("no_eos", lambda values: values.pop("eos_token"))
    edited(
        "own_code",
        lambda values: values.update(tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]}),
    )
    (here / "own_code" / "mine.py").write_text("raise SystemExit('the code of a model directory ran')\n")
    (_model(here, "no_template") / "chat_template.jinja").unlink()
    (_model(here, "strict_template") / "chat_template.jinja").write_text(
        "{{ raise_exception('roles must alternate') }}"
    )
    # as where a tokenizer was extended and the embedding was not
    _model(here, "small_vocabulary", vocab_size=300)
    weights = load_file(here / "small_vocabulary" / WEIGHTS)
    cut = {name: tensor[:300].clone() if tensor.shape[0] == 399 else tensor for name, tensor in weights.items()}
    save_file(cut, here / "small_vocabulary" / WEIGHTS)


def _bad_weights(here: Path) -> None:
    weights = load_file(here / "model" / WEIGHTS)
    (_model(here, "no_weights") / WEIGHTS).unlink()
    (_model(here, "pickled") / WEIGHTS).rename(here / "pickled" / "pytorch_model.bin")
    cut = _model(here, "cut_weights") / WEIGHTS
    cut.write_bytes(cut.read_bytes()[:-1000])
    (_model(here, "text_weights") / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")
    up = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, up: torch.zeros(64, 128)}, _model(here, "turned") / WEIGHTS)
    save_file({k: v for k, v in weights.items() if k != up}, _model(here, "lacking") / WEIGHTS)
    save_file({**weights, "model.extra": torch.zeros(1)}, _model(here, "extra") / WEIGHTS)
    for name in ("no_shard", "lost_name", "outside"):
        _shard(_model(here, name), weights)
    (here / "no_shard" / "part1.safetensors").unlink()
    _edit_index(here / "lost_name", lambda names: names.update({"model.more": "part0.safetensors"}))
    _edit_index(here / "outside", lambda names: names.update({up: "../model/model.safetensors"}))
    (_model(here, "garbled_index") / INDEX).write_text("{")
    tiny.make_model(here / "deeper_weights", num_hidden_layers=8)


def _shard(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    (folder / WEIGHTS).unlink()
    names: dict[str, str] = {}
    for number in range(2):
        part = {name: weights[name] for name in sorted(weights)[number::2]}
        save_file(part, folder / f"part{number}.safetensors")
        names |= dict.fromkeys(part, f"part{number}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def _edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def _odd_places(here: Path) -> None:
    (here / "nothing").mkdir()
    (here / "megatron").mkdir()
    (here / "megatron" / "metadata.json").write_text("{}")
    (here / "a_file").touch()
    earlier = here / "earlier" / "checkpoints" / "step-000007"
    earlier.mkdir(parents=True)
    (earlier / "metadata.json").write_text("{}")
    (here / "taken").mkdir()
    (here / "taken" / "checkpoints").touch()
    (here / "taken_too" / "metrics.jsonl").mkdir(parents=True)
