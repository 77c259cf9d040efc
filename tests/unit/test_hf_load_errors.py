"""Damaged model directories: refused before a parameter changes, naming tensor and file. No network is built."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_kto.checkpoint.hf_files import INDEX, SINGLE, HFTensors
from nemo_kto.checkpoint.hf_load import load_hf
from nemo_kto.config.architecture import read_architecture
from nemo_kto.errors import CheckpointError

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A copy of the tiny Llama that a test may damage."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


def load(folder):
    """Validation alone: with no chunks nothing is filled, and the layout is not asked for."""
    return load_hf([], read_architecture(folder), folder, groups=None)


def rewrite(folder, change):
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def shard(folder, weight_map_change=lambda weight_map: None):
    """Split the single file in two, with an index."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:10], names[10:])):
        save_file({name: tensors[name] for name in part}, folder / f"part{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"part{number}.safetensors")
    weight_map_change(weight_map)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def refused(folder, *parts):
    with pytest.raises(CheckpointError) as error:
        load(folder)
    for part in parts:
        assert part in str(error.value)


def test_sound_directories_pass(folder):
    assert load(folder) == 0  # headers only: no tensor data was read
    shard(folder)
    assert load(folder) == 0


def test_missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop(UP))
    refused(folder, str(folder), f"{UP} is missing")


def test_several_missing_tensors(folder):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.3." in name])
    refused(folder, "and 8 more tensors are missing")


def test_unexpected_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    refused(folder, SINGLE, "model.layers.0.self_attn.q_proj.bias is unexpected")


def test_rotary_buffers_of_old_exporters_are_ignored(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    load(folder)


def test_wrong_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({UP: torch.zeros(64, 128)}))
    refused(folder, SINGLE, UP, "[64, 128]", "[128, 64]")


def test_embedding_shorter_than_the_vocabulary(folder):
    name = "model.embed_tokens.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    refused(folder, name, "[398, 64]", "[399, 64]")


def test_integer_weights(folder):
    rewrite(folder, lambda tensors: tensors.update({UP: torch.zeros(128, 64, dtype=torch.int8)}))
    refused(folder, SINGLE, UP, "I8")


@pytest.mark.parametrize("keep", [0, 4, 500, 100_000])
def test_truncated_file(folder, keep):
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, str(path), "truncated or corrupt")


def test_corrupt_header(folder):
    path = folder / SINGLE
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)
    refused(folder, str(path), "truncated or corrupt")


def test_no_weights_at_all(folder):
    (folder / SINGLE).unlink()
    refused(folder, str(folder), "neither model.safetensors nor")


def test_pickles_are_never_loaded(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin is a pickle", "convert the model to safetensors")


def test_shard_missing(folder):
    shard(folder)
    (folder / "part1.safetensors").unlink()
    refused(folder, str(folder / "part1.safetensors"), "missing", INDEX)


def test_shard_truncated(folder):
    shard(folder)
    path = folder / "part1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, str(path), "truncated or corrupt")


def test_index_names_a_tensor_that_no_file_has(folder):
    shard(folder, lambda weight_map: weight_map.update({"model.more": "part0.safetensors"}))
    refused(folder, "part0.safetensors", "model.more is missing")


def test_index_points_outside(folder):
    shard(folder, lambda weight_map: weight_map.update({UP: "../part0.safetensors"}))
    refused(folder, INDEX, "'../part0.safetensors' is not a file name in this directory")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_broken_index(folder, text):
    (folder / INDEX).write_text(text)
    refused(folder, INDEX, "not a safetensors index")


def test_tensor_stored_twice(folder):
    shard(folder)
    tensors = load_file(folder / "part1.safetensors")
    tensors |= load_file(folder / "part0.safetensors")
    save_file(tensors, folder / "part1.safetensors")
    refused(folder, "part1.safetensors", "is also in part0.safetensors")


def test_slices_are_all_that_is_read(tiny_llama):
    with HFTensors(tiny_llama) as stored:
        whole = stored.read(UP)
        assert stored.bytes_read == whole.nbytes
        assert torch.equal(stored.read(UP, (0, 32, 64)), whole[32:64])
        assert torch.equal(stored.read(UP, (1, 16, 32)), whole[:, 16:32])
        assert stored.read(UP, (0, 128, 128)).shape == (0, 64)
        assert stored.bytes_read == whole.nbytes + 32 * 64 * 4 + 128 * 16 * 4
