"""LoRA as a user meets it: trained, resumed, exported, merged, scored, and refused where it does not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bad_session
import pytest
import tiny
import torch
from bad_cases import LAUNCHER
from safetensors.torch import load_file
from train_runs import Run, train

pytestmark = [pytest.mark.integration, pytest.mark.slow]

TUNING = "model.peft.lora_tuning"
LORA = ("model.peft.peft_scheme=lora", f"{TUNING}.adapter_dim=4", f"{TUNING}.alpha=8", "model.optim.lr=1e-2")
WORDS = (
    *LORA,
    *("model.data.num_workers=2", "model.hidden_dropout=0.1", f"{TUNING}.adapter_dropout=0.1"),
    *("trainer.kto.save_interval=3", "exp_manager.checkpoint_callback_params.save_top_k=-1"),
)
STEP = "checkpoints/step-000006"
RELATIVE = 1e-4
"""Of losses three steps after a change of layout, in float32: sums in another order, and dropout is off."""


def _whole(root: Path) -> Run:
    return train(root, "whole", *WORDS, "trainer.kto.max_steps=6")


def _halves(root: Path) -> Run:
    train(root, "halves", *WORDS, "trainer.kto.max_steps=3")
    return train(root, "halves", *WORDS, "trainer.kto.max_steps=6")


def _resharded(root: Path) -> tuple[Run, Run]:
    """Without dropout: six steps alone, and the last three of them again on two ranks."""
    words = (*LORA, "trainer.kto.save_interval=3", "trainer.kto.limit_val_batches=0")
    alone = train(root, "alone", *words, "trainer.kto.max_steps=6")
    start = "exp_manager.resume_from_checkpoint=alone/checkpoints/step-000003"
    layout = ("trainer.devices=2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
    return alone, train(root, "resharded", *words, *layout, start, "trainer.kto.max_steps=6")


def _gone_on(root: Path) -> dict[str, Run]:
    """A second training that starts from the adapters of the first, held to the base, and to base + adapters."""
    earlier = (*LORA, f"model.peft.restore_from_path=alone/{STEP}", "trainer.kto.max_steps=2")
    earlier += ("trainer.kto.limit_val_batches=0", "model.optim.sched.warmup_steps=0")
    swap = train(root, "swap", *earlier, "model.kto.reference=swap")
    first = (root / "swap" / "metrics.jsonl").read_text()
    lost = ("model.peft.restore_from_path=nowhere", "trainer.kto.max_steps=3")
    resumed = train(root, "swap", *earlier, "model.kto.reference=swap", *lost)
    assert (root / "swap" / "metrics.jsonl").read_text().startswith(first)
    return {"off": train(root, "off", *earlier), "swap": swap, "resumed": resumed}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    tiny.make_model(root / "model", num_hidden_layers=2)
    tiny.make_model(root / "other", num_hidden_layers=2, seed=1)
    tiny.make_records(root / "train.jsonl", 22, seed=1)
    tiny.make_records(root / "heldout.jsonl", 6, seed=2)
    _make_apart(root / "model", root / "apart")
    return root


def _make_apart(base: Path, out: Path) -> None:
    """Adapters that PEFT begins, where q, k and v have an A each, so that the fused layer has three times the rank."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=modules)
    )
    model.save_pretrained(out)


@pytest.fixture(scope="module")
def runs(root):
    with ThreadPoolExecutor(2) as pool:
        jobs = {job.__name__: pool.submit(job, root) for job in (_resharded, _whole, _halves)}
        done = {name: job.result() for name, job in jobs.items()}
    return {**done, **_gone_on(root)}


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(runs):
    whole, halves = runs["_whole"], runs["_halves"]
    assert len(whole.training) == 6
    assert halves.training == whole.training
    assert halves.validation == whole.validation
    assert _bytes_of(halves) == _bytes_of(whole)


def _bytes_of(run: Run) -> dict[str, object]:
    files = json.loads((run.out / STEP / "manifest.json").read_text())["files"]
    return {name: record for name, record in files.items() if name.endswith((".distcp", ".safetensors"))}


def test_it_starts_at_the_base_and_learns(runs):
    first, *_, last = runs["_resharded"][0].training  # without dropout
    assert (first["kl"], first["rewards/margins"], first["loss"]) == (0.0, 0.0, 1.0)
    assert last["rewards/margins"] > 0.1


def test_a_checkpoint_holds_adapters_alone(runs, root):
    """Four bytes each for the number and both of Adam's moments, and torch's archive around each tensor."""
    run = runs["_whole"]
    held = sum(file.stat().st_size for file in (run.out / STEP).glob("*.distcp"))
    hidden, ffn, rank, queries, keys = 64, 128, 4, 64, 32
    layer = (hidden + queries + 2 * keys) + (queries + hidden) + (hidden + 2 * ffn) + (ffn + hidden)
    assert 12 * 2 * rank * layer < held < 12 * 2 * rank * layer + 4096 * 3 * 2 * 8
    assert held < (root / "model" / "model.safetensors").stat().st_size
    assert not (run.out / "reference").exists()


def test_another_layout_goes_on_within_rounding(runs):
    alone, resharded = runs["_resharded"]
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
    data = ("--data", "heldout.jsonl", "--cache-dir", "cache")
    given = ["pretrained_checkpoint.restore_from_path=model", "model.data.data_prefix.train=[train.jsonl]"]
    given += ["model.data.cache_dir=cache", "model.data.seq_length=64", "model.data.num_workers=0"]
    given += ["model.global_batch_size=4", "model.micro_batch_size=2", "trainer.precision=32", *LORA]
    given += [
        "model.optim.sched.name=Constant",
        "model.optim.sched.warmup_steps=2",
        "exp_manager.explicit_log_dir=moved",
    ]
    given += ["model.kto.ref_policy_kl_penalty=0.5", "trainer.kto.max_epochs=3", "trainer.kto.limit_val_batches=0"]
    new = "exp_manager.explicit_log_dir=new"
    earlier, changes = "model.peft.restore_from_path", "exp_manager.resume_with_changes=true"
    apart = ["train", *given, "exp_manager.explicit_log_dir=from_apart"]
    convert = ["convert", "megatron-to-hf", "--input", step, "--output"]
    commands = {
        "adapter": [*convert, "peft", "--adapter"],
        "merge": [*convert, "merged", "--merge"],
        "score": ["score", "--model", "model", "--adapter", step, *data, "--out", "a.jsonl"],
        "score peft": ["score", "--model", "model", "--adapter", "peft", *data, "--out", "b.jsonl"],
        "score merged": ["score", "--model", "merged", "--reference", "model", *data, "--out", "c.jsonl"],
        "neither": [*convert, "x"],
        "other base to merge": [*convert, "x", "--merge", "--base", "other"],
        "whole model": ["convert", "megatron-to-hf", "--input", "megatron", "--output", "x", "--merge"],
        "to megatron": ["convert", "hf-to-megatron", "--input", "model", "--output", "megatron"],
        "other base to score": ["score", "--model", "other", "--adapter", step, *data, "--out", "d.jsonl"],
        "lost base": [*convert, "x", "--merge", "--base", "nowhere"],
        "other peft": ["train", *given, new, "model.peft.restore_from_path=peft", f"{TUNING}.alpha=4"],
        "both": ["score", "--model", "model", "--adapter", step, "--reference", "model", *data, "--out", "d.jsonl"],
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
    order = sorted(commands, key=lambda name: name == "whole model")
    return bad_session.run(root, {name: (commands[name], {}) for name in order}, LAUNCHER)


def test_exports_and_scores_agree(said, root):
    for name in ("adapter", "merge", "to megatron", "score", "score peft", "score merged", "from peft"):
        assert said[name].code == 0, said[name].text
    rows = {name: list(map(json.loads, (root / f"{name}.jsonl").read_text().splitlines())) for name in "abc"}
    assert all(abs(row["log_ratio"]) > 0.01 for row in rows["a"])
    assert rows["a"] == rows["b"], "the same numbers, read from two formats"
    for row, merged in zip(rows["a"], rows["c"], strict=True):
        # W + BA is rounded once where W x + B A x is rounded twice; sums of some 20 log-probs near -5 nats
        assert merged["policy_logp"] == pytest.approx(row["policy_logp"], abs=1e-3)
    metrics = [json.loads(line) for line in (root / "new" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["rewards/margins"] != 0.0, "it starts from the adapters"


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
    "lost base": (3, "nowhere, the base model of alone/checkpoints/step-000006, is not there: name it with --base"),
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
