"""``.nemo`` files on the command line: converted, trained from, scored, and refused with one message."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import nemo_archives
import pytest
import tiny
import torch
from safetensors.torch import load_file
from train_runs import train

from nemo_kto.cli.main import main

NEMO_KTO = ("-m", "nemo_kto.cli.main")
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("nemo")
    tiny.make_model(root / "model", num_hidden_layers=2)
    tiny.make_records(root / "train.jsonl", 22)
    tiny.make_records(root / "heldout.jsonl", 6, seed=1)
    nemo_archives.torch_archive(root / "nemo1.nemo", root / "model", tp=2)
    return root


def run(root: Path, *arguments: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NEMO_KTO_CACHE": str(root / "cache")}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.integration
def test_convert_there_on_one_rank_and_back_on_two_then_score(root):
    out = run(root, *NEMO_KTO, "convert", "to-nemo", "--input", "model", "--output", "own.nemo")
    assert out == "model -> own.nemo (float32)\n"
    back = ("convert", "from-nemo", "--input", "own.nemo", "--output", "back", "--tensor-parallel", 2)
    assert run(root, *TWO_RANKS, *NEMO_KTO, *back) == "own.nemo -> back (float32)\n"
    found, expected = weights(root / "back"), weights(root / "model")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (root / "back" / "tokenizer.json").is_file()
    assert not [path.name for path in root.iterdir() if path.name.startswith(".")]

    files = ("--model", "own.nemo", "--reference", "nemo1.nemo", "--data", "train.jsonl", "--out", "scores.jsonl")
    run(root, *NEMO_KTO, "score", *files)
    rows = [json.loads(line) for line in (root / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 22
    assert {row["log_ratio"] for row in rows} == {0.0}


@pytest.mark.slow
@pytest.mark.integration
def test_training_from_an_archive_is_training_from_its_model(root):
    words = ("trainer.kto.max_steps=2", "trainer.kto.limit_val_batches=0")
    words += ("model.optim.sched.warmup_steps=0",)
    words += ("exp_manager.create_checkpoint_callback=false",)
    expected = train(root, "from-hf", *words)
    found = train(root, "from-nemo", *words, "pretrained_checkpoint.restore_from_path=nemo1.nemo")
    assert len(found.training) == 2
    assert found.training == expected.training
    assert "nemo1.nemo is read from" in found.stderr
    again = train(root, "again", *words, "pretrained_checkpoint.restore_from_path=nemo1.nemo")
    assert again.training == expected.training
    assert "unpacking" not in again.stderr


def hostile(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in ("model_config.yaml", "../../pwned"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"a: "))
    return path


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("to-nemo", "--input", "model", "--output", "out.tar"), 2, "--output out.tar must end in .nemo"),
        (("to-nemo", "--input", "model", "--output", "nemo1.nemo"), 3, "nemo1.nemo exists: remove it or choose"),
        (("to-nemo", "--input", "absent", "--output", "new.nemo"), 3, "absent is not a directory"),
        (
            ("to-nemo", "--input", "model", "--output", "new.nemo", "--tensor-parallel", "3"),
            2,
            "4 attention heads % 3",
        ),
        (("from-nemo", "--input", "absent.nemo", "--output", "new"), 3, "absent.nemo cannot be opened: No such file"),
        (("from-nemo", "--input", "train.jsonl", "--output", "new"), 3, "train.jsonl is damaged, or no tar file"),
        (("from-nemo", "--input", "model", "--output", "new"), 3, "model cannot be opened: Is a directory"),
        (("from-nemo", "--input", "hub.nemo", "--output", "new"), 3, "from-nemo --tokenizer DIR"),
        (("from-nemo", "--input", "hub.nemo", "--output", "new", "--tokenizer", "absent"), 3, "absent is not a direc"),
        (("from-nemo", "--input", "evil.nemo", "--output", "new"), 3, "'../../pwned' would be unpacked outside"),
    ],
)
def test_refusals_of_convert(arguments, code, message, root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    hostile(root / "evil.nemo")
    if not (root / "hub.nemo").exists():
        section = {"library": "huggingface", "type": "org/model"}
        nemo_archives.torch_archive(root / "hub.nemo", root / "model", tokenizer=section)
    assert main(["convert", *arguments]) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not (root / "new").exists()
    assert not [path.name for path in root.iterdir() if path.name.startswith(".")], "something was left"


@pytest.mark.parametrize("verb", ["train", "score"])
def test_a_hostile_archive_is_refused_by_every_verb(verb, root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    monkeypatch.setenv("NEMO_KTO_CACHE", str(root / "a" / "cache"))
    hostile(root / "evil.nemo")
    arguments = {
        "train": ["pretrained_checkpoint.restore_from_path=evil.nemo", "model.data.data_prefix.train=[train.jsonl]"],
        "score": ["--model", "model", "--reference", "evil.nemo", "--data", "train.jsonl", "--out", "x.jsonl"],
    }
    assert main([verb, *arguments[verb]]) == 3
    assert "evil.nemo: '../../pwned' would be unpacked outside its directory" in capsys.readouterr().err
    assert not list(root.rglob("pwned"))
