"""PEFT directories that are no plain LoRA of this base, or are damaged: a CheckpointError that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hf_models
import pytest
import torch
from peft_kit import network, write_peft
from safetensors.torch import load_file, save_file

from nemo_kto.checkpoint.adapters import add_adapters
from nemo_kto.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
WRONG_CONFIGS = {
    "dora": ({"use_dora": True}, "use_dora"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "bias": ({"bias": "lora_only"}, "bias"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    "unknown target": ({"target_modules": ["q_proj", "w_pack"]}, "w_pack"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "no target": ({"target_modules": []}, "target_modules"),
    "kind": ({"peft_type": "LOHA"}, "LOHA"),
    "rank": ({"r": 0}, "r=0"),
    "scales": ({"alpha_pattern": {"q_proj": 1}}, "alpha over rank differs"),
    "pattern": ({"rank_pattern": {"layers.0.self_attn.q_proj": 2, "layers.1.self_attn.q_proj": 3}}, "rank_pattern"),
    "pattern of a layer": ({"alpha_pattern": {"model.layers.0.self_attn.q_proj": 40}}, "alpha_pattern"),
    "pattern of nothing": ({"alpha_pattern": {"q_proj": None}}, "gives q_proj None, which is no alpha"),
    "pattern of words": ({"rank_pattern": {"q_proj": "x"}}, "gives q_proj 'x', which is no rank"),
    "pattern of zero": ({"rank_pattern": {"q_proj": 0}}, "gives q_proj 0, which is no rank"),
    "pattern as a list": ({"rank_pattern": ["q_proj"]}, "is not a mapping"),
    "alpha": ({"lora_alpha": 0}, "lora_alpha=0"),
    "no expression": ({"target_modules": "["}, "is no pattern"),
    "number": ({"target_modules": 5}, "is neither a list"),
    "layers": ({"layers_to_transform": "last"}, "layers_to_transform"),
    "last layer": ({"layers_to_transform": [-1]}, "layers are counted from 0, none is negative"),
    "minus one": ({"layers_to_transform": -1}, "layers are counted from 0, none is negative"),
    "feature of tomorrow": ({"use_magic": True}, "use_magic"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return hf_models.make("llama3", tmp_path_factory.mktemp("base"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("peft") / "adapters"
    return write_peft(base, out, {"target_modules": ["q_proj", "v_proj"]})[0]


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Path:
    """A good directory, to be damaged."""
    return shutil.copytree(whole, tmp_path / "adapters")


def refusal(folder: Path, base: Path, groups) -> str:
    chunk, arch = network(base, groups)
    with pytest.raises(CheckpointError) as raised:
        add_adapters([chunk], arch, folder, base, groups)
    return str(raised.value)


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_what_our_adapters_cannot_be_is_refused(case: str, broken: Path, base: Path, groups) -> None:
    change, word = WRONG_CONFIGS[case]
    config = json.loads((broken / CONFIG).read_text())
    (broken / CONFIG).write_text(json.dumps({**config, **change}))
    message = refusal(broken, base, groups)
    assert str(broken / CONFIG) in message
    assert word in message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"peft_type": "LORA"}', '{"peft_type": "LORA", "r": "four"}'])
def test_configs_that_are_none(text: str, broken: Path, base: Path, groups) -> None:
    (broken / CONFIG).write_text(text)
    assert f"{broken / CONFIG} cannot be read" in refusal(broken, base, groups)


@pytest.mark.parametrize(
    "damage", ["missing tensor", "unexpected tensor", "shape", "layer", "cut", "absent", "garbage"]
)
def test_damaged_weights(damage: str, broken: Path, base: Path, groups) -> None:
    file = broken / WEIGHTS
    tensors, raw = load_file(file), file.read_bytes()
    if damage == "missing tensor":
        tensors.pop(NAME)
    elif damage == "unexpected tensor":
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
    elif damage == "shape":
        tensors[NAME] = torch.zeros(4, 32)
    elif damage == "layer":
        tensors = {name.replace("layers.1", "layers.2"): tensor for name, tensor in tensors.items()}
    save_file(tensors, file)
    if damage in ("cut", "garbage"):
        file.write_bytes(raw[: len(raw) // 2] if damage == "cut" else b"not a safetensors file")
    if damage == "absent":
        file.unlink()
    message = refusal(broken, base, groups)
    assert str(file) in message
    wanted = {
        "missing tensor": f"{NAME} is missing",
        "unexpected tensor": "is unexpected",
        "shape": f"{NAME} is [4, 32]",
    }
    assert wanted.get(damage, "") in message


def test_adapters_of_another_base_do_not_fit(whole: Path, groups, tmp_path: Path) -> None:
    wider = hf_models.make("llama3", tmp_path, num_hidden_layers=2, hidden_size=96)
    assert "the base model asks for" in refusal(whole, wider, groups)
