"""The verb ``prepare``: what it counts, advises, writes and refuses."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_kit import char_tokenizer, data_config, pair, write_jsonl

from nemo_kto.cli import prepare
from nemo_kto.data import tokenize
from nemo_kto.data.records import read_records
from nemo_kto.errors import ConfigError, DataError

USER = [{"role": "user", "content": "hi"}]


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args([str(a) for a in arguments]))


@pytest.fixture
def tokenizer(tmp_path):
    return char_tokenizer(
        tmp_path / "tok", merges=[("y", "z")], template="{% for m in messages %}{{ m.content }}{% endfor %}"
    )


@pytest.fixture
def data(tmp_path):
    """Lengths (prompt, response with EOS): (2, 3) (2, 3) (2, 3) (1, 6) (1, 2) (2, 2), the fifth split at a merge."""
    records = [
        pair("ab", "cd"),
        pair("ab", "cd"),
        pair("ab", "cd", liked=False),
        pair("x", "abcde"),
        {"prompt": "xy", "completion": "z", "label": False, "id": 5},
        pair(USER, "k"),
    ]
    return write_jsonl(tmp_path / "data.jsonl", records)


def report(capsys, *arguments) -> dict:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_report(data, tokenizer, capsys):
    result = report(capsys, "--data", data, "--tokenizer", tokenizer)
    assert result["files"] == [str(data)]
    assert (result["num_rows"], result["num_desirable"], result["num_undesirable"]) == (6, 4, 2)
    assert result["total_tokens"]["max"] == 7
    assert result["prompt_tokens"] == {"percentiles": {"p50": 2, "p90": 2, "p95": 2, "p99": 2}, "mean": 1.7, "max": 2}
    assert result["response_tokens"]["max"] == 6
    assert result["boundary_merges"] == 1
    assert (result["repeated_rows"], result["contradictions"]) == (1, 1)
    assert (result["distinct_prompts"], result["distinct_responses"]) == (4, 4)
    assert (result["longest_prompt_run"], result["longest_response_run"]) == (3, 3)
    assert result["prompt_share"] == 0.5
    assert result["written"] is None
    assert "seq_length" not in result
    advice = "\n".join(result["advice"])
    assert "model.data.seq_length=64 keeps all" in advice
    assert "unbalanced (2 : 1)" in advice
    assert "model.kto.undesirable_loss_weight between 1.5 and 2" in advice
    assert "1 rows repeat another one" in advice
    assert "1 responses are labelled both" in advice
    assert "up to 3 neighbours share a prompt or a response" in advice


def test_text(data, tokenizer, capsys):
    assert run("--data", data, "--tokenizer", tokenizer, "--seq-length", 6) == 0
    out = capsys.readouterr().out
    assert "6, all usable: 4 desirable, 2 undesirable" in out
    assert "at 6 tokens       1 rows dropped, 0 truncated" in out
    assert "boundary merges   1" in out
    assert "  - classes are unbalanced" in out


def test_append_eos(data, tokenizer, capsys):
    result = report(capsys, "--data", data, "--tokenizer", tokenizer, "--no-append-eos")
    assert result["total_tokens"]["max"] == 6


@pytest.mark.parametrize(
    ("options", "dropped", "truncated", "written"),
    [
        ([], 1, 0, 5),
        (["--overlong", "drop"], 1, 0, 5),
        (["--overlong", "truncate"], 0, 1, 6),
    ],
)
def test_out(data, tokenizer, capsys, tmp_path, options, dropped, truncated, written):
    out = tmp_path / "clean.jsonl"
    result = report(capsys, "--data", data, "--tokenizer", tokenizer, "--seq-length", 6, "--out", out, *options)
    assert (result["dropped"], result["truncated"], result["written"]) == (dropped, truncated, written)
    kept = [r for r in read_records([data]) if written == 6 or r.prompt != "x"]
    assert read_records([out]) == kept
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[-2] == {"prompt": "xy", "response": "z", "preference": "rejected"}
    assert lines[-1]["prompt"] == USER
    assert not list(tmp_path.glob(".*.tmp"))


def test_overlong_error(data, tokenizer, tmp_path):
    out = tmp_path / "clean.jsonl"
    with pytest.raises(DataError, match=r"data.jsonl:4: makes 7 tokens; want at most --seq-length 6"):
        run("--data", data, "--tokenizer", tokenizer, "--seq-length", 6, "--overlong", "error", "--out", out)
    assert not out.exists()
    assert run("--data", data, "--tokenizer", tokenizer, "--seq-length", 7, "--overlong", "error") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--overlong", "drop"], "give --seq-length too"),
        (["--seq-length", "1"], "give at least 2"),
        (["--cache-dir", "cache"], "give --seq-length, as model.data.seq_length"),
        (["--out", "clean.json"], "must end in .jsonl"),
        (["--out", "DATA"], "is one of the files of --data"),
        (["--out", "/nowhere/clean.jsonl"], "its directory does not exist"),
    ],
)
def test_refusals(data, tokenizer, options, message):
    with pytest.raises(ConfigError, match=message):
        run("--data", data, "--tokenizer", tokenizer, *[str(data) if o == "DATA" else o for o in options])


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_training_finds_its_tokens_in_the_cache(data, tokenizer, tmp_path, capsys, monkeypatch, overlong):
    cache = tmp_path / "cache"
    options = ("--seq-length", 6, "--overlong", overlong, "--cache-dir", cache)
    assert run("--data", data, "--tokenizer", tokenizer, *options) == 0
    monkeypatch.setattr(tokenize, "_write", lambda *_: pytest.fail("tokenised again"))
    settings = data_config(cache, seq_length=6, overlong=overlong)
    assert len(tokenize.build_store([data], tokenizer, settings)) == (5 if overlong == "drop" else 6)


def test_balanced_data_and_common_responses(tmp_path, tokenizer, capsys):
    records = [pair(f"p{i}", "yes" if i < 7 else f"no {i}", liked=i % 2 == 0) for i in range(10)]
    result = report(capsys, "--data", write_jsonl(tmp_path / "b.jsonl", records), "--tokenizer", tokenizer)
    advice = "\n".join(result["advice"])
    assert "classes are balanced" in advice
    assert "one response makes up 70% of the rows" in advice


def test_one_class(tmp_path, tokenizer, capsys):
    data = write_jsonl(tmp_path / "b.jsonl", [pair(f"p{i}", f"r{i}") for i in range(4)])
    advice = "\n".join(report(capsys, "--data", data, "--tokenizer", tokenizer)["advice"])
    assert "no undesirable row" in advice


def test_length_advice(tmp_path, tokenizer, capsys):
    records = [pair("p", "r" * (300 if i == 0 else 30), liked=i % 2 == 0) for i in range(400)]
    data = write_jsonl(tmp_path / "b.jsonl", records)
    advice = report(capsys, "--data", data, "--tokenizer", tokenizer)["advice"][0]
    assert advice == "model.data.seq_length=64 keeps 99% of the rows whole, model.data.seq_length=320 keeps all"


def test_command_line_exit_codes(data, tokenizer, tmp_path):
    """Bad data ends with 3 and its place, before anything heavy is imported."""
    data.write_text(data.read_text() + "{}\n")
    code = (
        "import sys; from nemo_kto.cli import prepare; from nemo_kto.cli.main import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "prepare", "--data", str(data), "--tokenizer", str(tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert f"{Path(data)}:7: has no prompt" in done.stderr
