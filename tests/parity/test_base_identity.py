"""Which base model adapters belong to: the weights that are loaded and the network's constants, nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import hf_models
import pytest
from peft_kit import adapted, network, save
from safetensors.torch import load_file, save_file

from nemo_kto.checkpoint.adapters import add_adapters
from nemo_kto.checkpoint.base_identity import base_identity
from nemo_kto.checkpoint.dist import save_model
from nemo_kto.config import manifest
from nemo_kto.config.lora import LoraSpec
from nemo_kto.errors import CheckpointError

SPEC = LoraSpec(4, {"linear_qkv": 4}, 2.0)
SINGLE, SHARDS, INDEX = (
    "model.safetensors",
    ("model-1.safetensors", "model-2.safetensors"),
    "model.safetensors.index.json",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return hf_models.make("llama3", tmp_path_factory.mktemp("base"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def saved(base: Path, groups, tmp_path_factory) -> Path:
    """A checkpoint of adapters on it."""
    chunk, _ = adapted(base, SPEC, groups)
    return save(chunk, base, SPEC, tmp_path_factory.mktemp("run") / "step-000001", groups)


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "copy")


def written_out(folder: Path, *names: str) -> str:
    """The identity as it is defined: of names and contents, in order."""
    found = [(name, hashlib.sha256((folder / name).read_bytes()).hexdigest()) for name in names]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def in_two(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    parts = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    places = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    (folder / SINGLE).unlink()


@pytest.mark.parametrize("shards", [False, True])
def test_only_the_weights_count(shards: bool, copy: Path, groups) -> None:
    """A model with an adapter beside it, as PEFT and merges leave behind, stays the same model."""
    if shards:
        in_two(copy)
    wanted = written_out(copy, *(SHARDS if shards else (SINGLE,)))
    assert base_identity(copy) == wanted
    for stray in ("adapter_model.safetensors", "model-0.safetensors", "0_0.distcp"):
        (copy / stray).write_bytes(b"stray")
    assert base_identity(copy) == wanted
    with (copy / (SHARDS[1] if shards else SINGLE)).open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"else")
    assert base_identity(copy) != wanted


def test_a_manifest_is_believed_and_tells_what_counts(base: Path, copy: Path, groups, tmp_path: Path) -> None:
    chunk, _ = network(base, groups)
    save_model([chunk], base, tmp_path / "megatron", groups)
    names = sorted(file.name for file in (tmp_path / "megatron").glob("*.distcp"))
    wanted = written_out(tmp_path / "megatron", *names)
    (tmp_path / "megatron" / "__9_9.distcp").write_bytes(b"stray")
    assert base_identity(tmp_path / "megatron") == wanted
    (copy / "adapter_model.safetensors").write_bytes(b"stray")
    manifest.complete(copy, {})
    assert base_identity(copy) == base_identity(base)


def test_without_weights_there_is_no_identity(copy: Path, groups) -> None:
    (copy / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        base_identity(copy)


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 0.25), ("rope_theta", 77.0)])
def test_another_constant_is_another_base(key: str, value: float, saved: Path, copy: Path, groups) -> None:
    """The same weights, but a network that computes something else with them."""
    config = json.loads((copy / "config.json").read_text())
    place = config["rope_parameters"] if key in config.get("rope_parameters", {}) else config
    place[key] = value
    (copy / "config.json").write_text(json.dumps(config))
    chunk, arch = network(copy, groups)
    with pytest.raises(CheckpointError) as raised:
        add_adapters([chunk], arch, saved, copy, groups)
    name = {"rms_norm_eps": "norm_epsilon"}.get(key, key)
    assert f"another network than {copy} is: {name} was " in str(raised.value)
    assert f", now {value}" in str(raised.value)


def test_how_long_rows_may_be_changes_nothing(saved: Path, copy: Path, groups) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 128}))
    chunk, arch = network(copy, groups)
    add_adapters([chunk], arch, saved, copy, groups)
