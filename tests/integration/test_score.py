"""`nemo-kto score` against transformers, alone and over TP x PP x DP, and its wrong inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from nemo_kto.cli.main import main

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("score")
    return {
        "policy": tiny.make_model(root / "policy", seed=1, tie_word_embeddings=True),
        "reference": tiny.make_model(root / "reference", seed=2, tie_word_embeddings=True),
        "data": tiny.make_records(root / "data.jsonl", 21, seed=3),
        "root": root,
    }


def _score(places: dict[str, Path], out: str, *options: str, ranks: int = 1) -> list[dict[str, Any]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    target = places["root"] / out
    command = [sys.executable, *launcher, "-m", "nemo_kto.cli.main", "score", "--model", str(places["policy"])]
    command += ["--data", str(places["data"]), "--out", str(target), "--micro-batch-size", "2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NEMO_KTO_CACHE": str(places["root"] / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in target.read_text().splitlines()]


def _transformers_logps(model_dir: Path, data: Path) -> list[float]:
    """Sum of log p over the response and its EOS, row by row and unpadded, in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64).eval()
    sums = []
    for line in data.read_text().splitlines():
        record = json.loads(line)
        prompt = tokenizer(record["prompt"])["input_ids"]
        whole = [*tokenizer(record["prompt"] + record["response"])["input_ids"], tokenizer.eos_token_id]
        assert whole[: len(prompt)] == prompt
        with torch.no_grad():
            logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        sums.append(sum(logps[t - 1, whole[t]].item() for t in range(len(prompt), len(whole))))
    return sums


@pytest.mark.slow
def test_scores_equal_transformers_alone_and_sharded(places: dict[str, Path]) -> None:
    summary = places["root"] / "summary.json"
    reference = ("--reference", str(places["reference"]))
    alone = _score(places, "alone.jsonl", *reference, "--summary-json", str(summary), "--beta", "0.5")
    policy = _transformers_logps(places["policy"], places["data"])
    base = _transformers_logps(places["reference"], places["data"])
    assert [row["index"] for row in alone] == list(range(21))
    for row, logp, ref in zip(alone, policy, base, strict=True):
        # float32 network against float64: about 1e-6 relative on sums near 100 nats, as on logits (design section 5)
        assert row["policy_logp"] == pytest.approx(logp, abs=2e-3)
        assert row["ref_logp"] == pytest.approx(ref, abs=2e-3)
        assert row["log_ratio"] == row["policy_logp"] - row["ref_logp"]
        assert row["reward"] == 0.5 * row["log_ratio"]
    labels = [json.loads(line)["preference"] == "chosen" for line in places["data"].read_text().splitlines()]
    chosen = [row["reward"] for row, label in zip(alone, labels, strict=True) if label]
    rejected = [row["reward"] for row, label in zip(alone, labels, strict=True) if not label]
    told = json.loads(summary.read_text())
    assert told["margin"] == pytest.approx(sum(chosen) / len(chosen) - sum(rejected) / len(rejected), abs=1e-12)
    assert told["auc"] == pytest.approx(sum(c > r for c in chosen for r in rejected) / len(chosen) / len(rejected))

    sharded = _score(
        places,
        "sharded.jsonl",
        *reference,
        "--tensor-parallel",
        "2",
        "--pipeline-parallel",
        "2",
        "--beta",
        "0.5",
        ranks=4,
    )
    spread = _score(places, "spread.jsonl", *reference, "--beta", "0.5", ranks=2)
    for rows in (sharded, spread):
        assert [(r["index"], r["num_tokens"]) for r in rows] == [(r["index"], r["num_tokens"]) for r in alone]
        for row, other in zip(rows, alone, strict=True):
            # the order of float32 sums over shards, and padding, move a sum of ~30 tokens by a few 1e-5 nats
            assert row["policy_logp"] == pytest.approx(other["policy_logp"], abs=1e-3)
            assert row["ref_logp"] == pytest.approx(other["ref_logp"], abs=1e-3)


def test_without_reference_rewards_are_null(places: dict[str, Path]) -> None:
    rows = _score(places, "plain.jsonl")
    assert {(row["ref_logp"], row["log_ratio"], row["reward"]) for row in rows} == {(None, None, None)}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--beta", "0"), 2, "--beta 0.0 must be above 0"),
        (("--micro-batch-size", "0"), 2, "--micro-batch-size 0 must be at least 1"),
        (("--seq-length", "100000"), 2, "max_position_embeddings"),
        (("--seq-length", "12"), 3, "data.jsonl:1"),
        (("--tensor-parallel", "3"), 2, "tensor_model_parallel_size=3"),
        (("--out", "nowhere/at/all/out.jsonl"), 2, "does not exist"),
        (("--reference", "no-such-model"), 3, "no-such-model"),
        (("--data", "no-such-file.jsonl"), 3, "no-such-file.jsonl"),
    ],
)
def test_wrong_input_is_one_message_and_its_code(
    places: dict[str, Path], options: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(places["policy"]), "--data", str(places["data"]), "--out", str(places["root"] / "x.jsonl")]
    assert main(["score", *given, "--cache-dir", str(places["root"] / "cache"), *options]) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
