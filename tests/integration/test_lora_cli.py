"""LoRA as a user meets it: trained, resumed, exported, merged, scored, and refused where it does not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bad_session
import lora_trainings
import pytest
import torch
from bad_cases import LAUNCHER
from lora_trainings import LORA, STEP, TUNING
from safetensors.torch import load_file
from train_runs import HELDOUT, ROWS, Run, make_files

pytestmark = [pytest.mark.integration, pytest.mark.slow]

RELATIVE = 1e-4
"""Of losses three steps after a change of layout, in float32: sums in another order, and dropout is off."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    make_files(root, ROWS, HELDOUT)
    lora_trainings.make_apart(root / "model", root / "apart")
    return root


@pytest.fixture(scope="module")
def runs(root):
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            job.__name__: pool.submit(job, root)
            for job in (lora_trainings.resharded, lora_trainings.whole, lora_trainings.halves)
        }
        done = {name: job.result() for name, job in jobs.items()}
    return {**done, **lora_trainings.gone_on(root)}


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(runs):
    whole, halves = runs["whole"], runs["halves"]
    assert len(whole.training) == 6
    assert halves.training == whole.training
    assert halves.validation == whole.validation
    assert _bytes_of(halves) == _bytes_of(whole)


def _bytes_of(run: Run) -> dict[str, object]:
    files = json.loads((run.out / STEP / "manifest.json").read_text())["files"]
    return {name: record for name, record in files.items() if name.endswith((".distcp", ".safetensors"))}


def test_it_starts_at_the_base_and_learns(runs):
    first, *_, last = runs["resharded"][0].training  # without dropout
    assert (first["kl"], first["rewards/margins"], first["loss"]) == (0.0, 0.0, 1.0)
    assert last["rewards/margins"] > 0.1


def test_a_checkpoint_holds_adapters_alone(runs, root):
    """Four bytes each for the number and both of Adam's moments, and torch's archive around each tensor."""
    run = runs["whole"]
    held = sum(file.stat().st_size for file in (run.out / STEP).glob("*.distcp"))
    hidden, ffn, rank, queries, keys = 64, 128, 4, 64, 32
    layer = (hidden + queries + 2 * keys) + (queries + hidden) + (hidden + 2 * ffn) + (ffn + hidden)
    assert 12 * 2 * rank * layer < held < 12 * 2 * rank * layer + 4096 * 3 * 2 * 8
    assert held < (root / "model" / "model.safetensors").stat().st_size
    assert not (run.out / "reference").exists()


def test_another_layout_goes_on_within_rounding(runs):
    alone, resharded = runs["resharded"]
    for found, expected in zip(resharded.training, alone.training[3:], strict=True):
        for key in ("loss", "grad_norm", "rewards/chosen"):
            assert found[key] == pytest.approx(expected[key], rel=RELATIVE)


def test_the_reference_of_a_second_training(runs, root):
    off, swap, resumed = runs["off"].training, runs["swap"].training, runs["resumed"].training
    assert off[0]["loss"] != 1.0, "held to the base, it is ahead already"
    assert (swap[0]["kl"], swap[0]["loss"]) == (0.0, 1.0)
    assert [line["step"] for line in resumed] == [1, 2, 3]
    assert resumed[2]["loss"] != 1.0
    assert (root / "swap" / "reference" / "adapters.json").is_file()


@pytest.fixture(scope="module")
def said(runs, root) -> dict[str, bad_session.Done]:
    """Everything else in one process."""
    step = f"alone/{STEP}"
    shutil.copytree(root / "alone", root / "moved")
    shutil.copytree(root / "model", root / "same")
    shutil.copytree(root / "model", root / "odd")
    config = json.loads((root / "odd" / "config.json").read_text())
    (root / "odd" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.25}))
    given = ["pretrained_checkpoint.restore_from_path=model", "model.data.data_prefix.train=[train.jsonl]"]
    given += ["model.data.cache_dir=cache", "model.data.seq_length=64", "model.data.num_workers=0"]
    given += ["model.global_batch_size=4", "model.micro_batch_size=2", "trainer.precision=32", *LORA]
    given += [
        "model.optim.sched.name=Constant",
        "model.optim.sched.warmup_steps=2",
        "exp_manager.explicit_log_dir=moved",
    ]
    given += ["model.kto.ref_policy_kl_penalty=0.5", "trainer.kto.max_epochs=3", "trainer.kto.limit_val_batches=0"]
    commands = _exports_and_scores(step) | _trainings(given, step) | _on_an_archive(given)
    order = sorted(commands, key=lambda name: name == "whole model")
    return bad_session.run(root, {name: (commands[name], {"NEMO_KTO_CACHE": "cache"}) for name in order}, LAUNCHER)


def _exports_and_scores(step: str) -> dict[str, list[str]]:
    data = ("--data", "heldout.jsonl", "--cache-dir", "cache")
    convert = ["convert", "megatron-to-hf", "--input", step, "--output"]
    return {
        "adapter": [*convert, "peft", "--adapter"],
        "merge": [*convert, "merged", "--merge"],
        "score": ["score", "--model", "model", "--adapter", step, *data, "--out", "a.jsonl"],
        "score peft": ["score", "--model", "model", "--adapter", "peft", *data, "--out", "b.jsonl"],
        "score merged": ["score", "--model", "merged", "--reference", "model", *data, "--out", "c.jsonl"],
        "neither": [*convert, "x"],
        "other base to merge": [*convert, "x", "--merge", "--base", "other"],
        "other constants to score": ["score", "--model", "odd", "--adapter", step, *data, "--out", "d.jsonl"],
        "other constants to merge": [*convert, "x", "--merge", "--base", "odd"],
        "other base for peft": [*convert, "x", "--adapter", "--base", "other"],
        "lost base for peft": [*convert, "x", "--adapter", "--base", "nowhere"],
        "same base for peft": [*convert, "peft same", "--adapter", "--base", "same"],
        "to nemo": ["convert", "to-nemo", "--input", step, "--output", "x.nemo"],
        "whole model": ["convert", "megatron-to-hf", "--input", "megatron", "--output", "x", "--merge"],
        "to megatron": ["convert", "hf-to-megatron", "--input", "model", "--output", "megatron"],
        "other base to score": ["score", "--model", "other", "--adapter", step, *data, "--out", "d.jsonl"],
        "lost base": [*convert, "x", "--merge", "--base", "nowhere"],
        "both": ["score", "--model", "model", "--adapter", step, "--reference", "model", *data, "--out", "d.jsonl"],
    }


def _trainings(given: list[str], step: str) -> dict[str, list[str]]:
    new = "exp_manager.explicit_log_dir=new"
    earlier, changes = "model.peft.restore_from_path", "exp_manager.resume_with_changes=true"
    apart = ["train", *given, "exp_manager.explicit_log_dir=from_apart"]
    return {
        "other peft": ["train", *given, new, "model.peft.restore_from_path=peft", f"{TUNING}.alpha=4"],
        "no base": ["train", *given, new, f"pretrained_checkpoint.restore_from_path={step}"],
        "other base": ["train", *given, "pretrained_checkpoint.restore_from_path=other", "trainer.kto.max_steps=9"],
        "other base, changes": [
            *("train", *given, "pretrained_checkpoint.restore_from_path=other", "trainer.kto.max_steps=9", changes)
        ],
        "other rank, changes": ["train", *given, f"{TUNING}.adapter_dim=8", "trainer.kto.max_steps=9", changes],
        "other scale": ["train", *given, f"{TUNING}.alpha=4", "trainer.kto.max_steps=9"],
        "other adapters": ["train", *given, new, f"model.peft.restore_from_path={step}", f"{TUNING}.adapter_dim=8"],
        "whole run": ["train", *given, "model.peft.peft_scheme=none", "trainer.kto.max_steps=9"],
        "from peft": ["train", *given, new, "model.peft.restore_from_path=peft", "trainer.kto.max_steps=3"],
        "apart": [*apart, f"{earlier}=apart", "trainer.kto.max_steps=3"],
        "apart, start lost": [*apart, f"{earlier}=nowhere", "trainer.kto.max_steps=4"],
        "apart, start not named": [*apart, "trainer.kto.max_steps=5"],
    }


def _on_an_archive(given: list[str]) -> dict[str, list[str]]:
    """A run on a .nemo file, which unpacks to a Megatron checkpoint."""
    start = "pretrained_checkpoint.restore_from_path=model.nemo"
    convert = ["convert", "megatron-to-hf", "--input", "packed/checkpoints/step-000003", "--output"]
    return {
        "archive": ["convert", "to-nemo", "--input", "model", "--output", "model.nemo"],
        "packed": ["train", *given, start, "exp_manager.explicit_log_dir=packed", "trainer.kto.max_steps=3"],
        "packed merge": [*convert, "packed merged", "--merge", "--base", "model.nemo"],
        "packed merge alone": [*convert, "packed alone", "--merge"],
        "packed adapter": [*convert, "packed peft", "--adapter", "--base", "model"],
        "packed adapter archive": [*convert, "packed peft 2", "--adapter", "--base", "model.nemo"],
        "packed other format": [*convert, "x", "--merge", "--base", "model"],
        "packed other network": [*convert, "x", "--adapter", "--base", "odd"],
    }


def test_exports_and_scores_agree(said, root):
    for name in (
        "adapter",
        "merge",
        "to megatron",
        "score",
        "score peft",
        "score merged",
        "from peft",
        "same base for peft",
    ):
        assert said[name].code == 0, said[name].text
    rows = {name: list(map(json.loads, (root / f"{name}.jsonl").read_text().splitlines())) for name in "abc"}
    assert all(abs(row["log_ratio"]) > 0.01 for row in rows["a"])
    assert rows["a"] == rows["b"], "the same numbers, read from two formats"
    for row, merged in zip(rows["a"], rows["c"], strict=True):
        # W + BA is rounded once where W x + B A x is rounded twice; sums of some 20 log-probs near -5 nats
        assert merged["policy_logp"] == pytest.approx(row["policy_logp"], abs=1e-3)
    assert json.loads((root / "peft same" / "adapter_config.json").read_text())["base_model_name_or_path"] == "same"
    metrics = [json.loads(line) for line in (root / "new" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["rewards/margins"] != 0.0, "it starts from the adapters"


def test_an_archive_is_a_base_like_any_other(said, root):
    done = {
        name: said[name] for name in said if name in ("archive", "packed") or name.startswith(("packed m", "packed a"))
    }
    assert all(each.code == 0 for each in done.values()), done
    named, alone = (load_file(root / name / "model.safetensors") for name in ("packed merged", "packed alone"))
    assert named.keys() == alone.keys()
    assert all(torch.equal(tensor, alone[name]) for name, tensor in named.items())
    assert "that model has the same weights is taken on trust" in done["packed adapter"].text
    assert done["packed adapter archive"].text.count("on trust") == 0
    assert json.loads((root / "packed peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == "model"


def test_a_resumed_run_needs_no_start(said, root):
    """All it needs is in its newest checkpoint, the rank of a layer that was three modules too."""
    for name in ("apart", "apart, start lost", "apart, start not named"):
        assert said[name].code == 0, said[name].text
    metrics = map(json.loads, (root / "from_apart" / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    first, *_, last = sorted((root / "from_apart" / "checkpoints").glob("step-*/adapters.json"))
    assert first.read_text() == last.read_text()
    assert json.loads(last.read_text())["ranks"]["linear_qkv"] == 12


def test_two_ranks_merge_the_same(said, root):
    """Each its own shard, without exchange: whole rows of B by whole columns of A."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "nemo_kto.cli.main", "convert", "megatron-to-hf", "--merge", "--tensor-parallel", "2"]
    command += ["--input", f"alone/{STEP}", "--output", "merged2"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(root / name / "model.safetensors") for name in ("merged", "merged2"))
    assert one.keys() == two.keys()
    # sums of four products, in whatever order a kernel takes for the width that it is given
    assert all((one[name] - two[name]).abs().max() < 1e-6 for name in one)


REFUSED = {
    "neither": (2, "holds LoRA adapters: --adapter writes them for PEFT, --merge writes base + adapters"),
    "other base to merge": (3, "belong to other base weights (then model, SHA-256 "),
    "whole model": (2, "megatron is a whole model: --adapter, --merge and --base are for LoRA runs"),
    "other base to score": (3, "give the model they were trained on"),
    "other base for peft": (3, "belong to other base weights (then model, SHA-256 "),
    "lost base": (3, "--base nowhere is not there: name the base model of alone/checkpoints/step-000006"),
    "lost base for peft": (3, "--base nowhere is not there"),
    "other constants to score": (3, "another network than odd is: norm_epsilon was "),
    "other constants to merge": (3, "another network than odd is: norm_epsilon was "),
    "packed other format": (3, "give the model they were trained on, in the same format"),
    "packed other network": (3, "another network than odd is: norm_epsilon was "),
    "to nemo": (2, "holds LoRA adapters alone: merge them first, with convert megatron-to-hf --merge"),
    "other peft": (2, "does not describe the adapters of peft: set target_modules=[attention_qkv,"),
    "both": (2, "--adapter and --reference exclude each other"),
    "no base": (2, "holds adapters alone: give their base model there"),
    "other base": (3, "moved/checkpoints/step-000006 belong to other base weights"),
    "other base, changes": (3, "moved/checkpoints/step-000006 belong to other base weights"),
    "other rank, changes": (2, "does not describe the adapters of moved/checkpoints/step-000006: set target_modules="),
    "other scale": (2, "model.peft.lora_tuning.alpha was 8.0, now 4.0"),
    "other adapters": (2, "target_modules=[attention_qkv,attention_dense,mlp_fc1,mlp_fc2] adapter_dim=4 alpha=8"),
    "whole run": (2, "model.peft.peft_scheme was lora, now none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_one_message(name, said):
    code, fragment = REFUSED[name]
    assert said[name].code == code, said[name].text
    assert fragment in said[name].text
    assert said[name].text.count("error: ") == 1
    assert "Traceback" not in said[name].text


def test_transformers_computes_the_same_from_both_exports(said, root):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(name: str):
        return AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32).eval()

    ids = torch.randint(3, 390, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base, adapted = load("model")(ids).logits, PeftModel.from_pretrained(load("model"), root / "peft")(ids).logits
        merged = load("merged")(ids).logits
    assert (adapted - base).abs().max() > 0.1
    assert (adapted - merged).abs().max() < 1e-4  # float32; of logits near 5
