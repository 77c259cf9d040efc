"""``nemo-kto convert`` as a user runs it: there alone, back on two ranks, and nothing is lost."""

from __future__ import annotations

import subprocess
import sys

import hf_models
import pytest
import torch
from safetensors.torch import load_file

from nemo_kto.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return hf_models.make("qwen3", tmp_path_factory.mktemp("convert"), dtype="bfloat16")


def run(*arguments):
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.integration
def test_there_and_back(model, tmp_path):
    megatron, back = tmp_path / "megatron", tmp_path / "hf"
    convert = ("nemo_kto.cli.main", "convert")
    assert run(*convert, "hf-to-megatron", "--input", model, "--output", megatron) == f"{model} -> {megatron} (bf16)\n"
    two_ranks = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", *convert, "megatron-to-hf")
    report = run(*two_ranks, "--input", megatron, "--output", back, "--pipeline-parallel", 2)
    assert report == f"{megatron} -> {back} (bfloat16)\n"  # once, not by every rank
    stored, written = load_file(model / "model.safetensors"), {}
    for file in back.glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == stored.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == written[name].dtype == torch.bfloat16
        assert torch.equal(tensor, written[name])


@pytest.mark.parametrize(
    ("direction", "options", "code", "message"),
    [
        ("hf-to-megatron", ["--tensor-parallel", "3"], 2, "4 attention heads % 3 = 1"),
        ("hf-to-megatron", ["--input", "nowhere"], 3, "nowhere/config.json: not found"),
        ("hf-to-megatron", ["--output", "."], 3, ". exists: remove it or choose another --output"),
        ("megatron-to-hf", [], 3, "is not a Megatron checkpoint"),
    ],
)
def test_refusals(direction, options, code, message, model, tmp_path, capsys):
    """Later options win; all are told before torch.distributed starts."""
    given = ["--input", str(model), "--output", str(tmp_path / "out"), *options]
    assert main(["convert", direction, *given]) == code
    assert message in capsys.readouterr().err
