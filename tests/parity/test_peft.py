"""Adapters mean to Hugging Face's PEFT what they mean here, both ways: same logits, or a named refusal."""

from __future__ import annotations

import json
from pathlib import Path

import hf_models
import pytest
import torch
from peft_kit import adapted, base_logits, loaded_by_peft, logits_of, megatron_logits, network, off, save, write_peft

from nemo_kto.checkpoint.adapters import adapter_spec, add_adapters
from nemo_kto.checkpoint.hf_export import export_hf
from nemo_kto.checkpoint.peft_export import export_peft
from nemo_kto.config.lora import LoraSpec
from nemo_kto.errors import CheckpointError
from nemo_kto.gpt import lora

FP32_TOLERANCE = 1e-4
"""Of logits of about 4, for the reasons given in ``test_hf_logits.py``; a wrong half or scale shows as 1e-1."""
BASES = {
    "llama": ("llama3", {"num_hidden_layers": 2}),
    "tied": ("llama_tied", {"num_hidden_layers": 2}),
    "qwen2": ("qwen2", {"num_hidden_layers": 2}),  # biases of q, k and v
    "qwen3": ("qwen3", {"num_hidden_layers": 2}),  # q and k are normed after their projections; wide heads
}
EVERY = {"linear_qkv": 4, "linear_proj": 4, "linear_fc1": 4, "linear_fc2": 4}
OUTGOING = {
    "all": LoraSpec(4, EVERY, 2.0),
    "attention": LoraSpec(3, {"linear_qkv": 3, "linear_proj": 3}, 1.0),
    "second layer's mlp": LoraSpec(8, {"linear_fc1": 8, "linear_fc2": 8}, 0.5, (1,)),
    "stacked": LoraSpec(4, {"linear_qkv": 12, "linear_fc2": 4}, 2.0),  # as when it came from three different A
}
INCOMING = {
    "all": {"target_modules": "all-linear"},
    "query and value": {"target_modules": ["q_proj", "v_proj"]},
    "value and up": {"target_modules": ["v_proj", "up_proj"]},
    "key and gate": {"target_modules": ["k_proj", "gate_proj"]},
    "by pattern": {"target_modules": r".*\.(o_proj|gate_proj)"},
    "rank-stabilised": {"target_modules": ["q_proj", "k_proj", "down_proj"], "use_rslora": True},
    "first layer": {"target_modules": ["v_proj", "o_proj", "up_proj"], "layers_to_transform": [0]},
    "ranks": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 2, "down_proj": 6},
        "alpha_pattern": {"v_proj": 4, "down_proj": 12},
    },
}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """Directory of a base model, made on first use."""
    root = tmp_path_factory.mktemp("bases")

    def made(name: str) -> Path:
        case, sizes = BASES[name]
        return root / name / case if (root / name).is_dir() else hf_models.make(case, root / name, **sizes)

    return made


@pytest.fixture(scope="module")
def peft_of(base_of, tmp_path_factory):
    """A directory that PEFT has written, and the logits of the model that it was saved from, by base and case."""
    root, made = tmp_path_factory.mktemp("adapters"), {}

    def found(base: str, case: str) -> tuple[Path, torch.Tensor]:
        if (base, case) not in made:
            made[base, case] = write_peft(base_of(base), root / f"{base} {case}", INCOMING[case])
        return made[base, case]

    return found


# ------------------------------------------------------------------------------------------------ out

outgoing = pytest.mark.parametrize(
    ("base", "case"), [*((base, "all") for base in BASES), *(("llama", case) for case in OUTGOING if case != "all")]
)


@outgoing
def test_peft_loads_what_is_exported(base: str, case: str, base_of, groups, tmp_path: Path) -> None:
    folder, spec = base_of(base), OUTGOING[case]
    chunk, arch = adapted(folder, spec, groups)
    export_peft(save(chunk, folder, spec, tmp_path / "saved", groups), arch, tmp_path / "out")
    theirs, ours = logits_of(loaded_by_peft(folder, tmp_path / "out")), megatron_logits(chunk)
    assert off(ours, base_logits(folder)) > 0.1
    assert off(ours, theirs) < FP32_TOLERANCE
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)


@outgoing
def test_merged_weights_are_the_adapted_network(base: str, case: str, base_of, groups, tmp_path: Path) -> None:
    folder = base_of(base)
    chunk, arch = adapted(folder, OUTGOING[case], groups)
    wanted = megatron_logits(chunk)
    lora.merge([chunk])
    assert off(megatron_logits(chunk), wanted) < FP32_TOLERANCE
    export_hf([chunk], arch, groups, folder, tmp_path / "merged")
    assert off(base_logits(tmp_path / "merged"), wanted) < FP32_TOLERANCE
    bare, _ = network(tmp_path / "merged", groups)
    assert off(megatron_logits(bare), wanted) < FP32_TOLERANCE


def test_export_replaces_nothing_and_trusts_nothing(base_of, groups, tmp_path: Path) -> None:
    folder, spec = base_of("llama"), OUTGOING["attention"]
    chunk, arch = adapted(folder, spec, groups)
    saved = save(chunk, folder, spec, tmp_path / "saved", groups)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists: remove it"):
        export_peft(saved, arch, tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds no adapters"):
        export_peft(folder, arch, tmp_path / "new")
    largest = max(saved.glob("*.distcp"), key=lambda file: file.stat().st_size)
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2] ^= 1  # a number that is still one
    for content in (raw, b""):
        largest.write_bytes(content)
        with pytest.raises(CheckpointError, match="saved is damaged"):
            export_peft(saved, arch, tmp_path / "new")
    (saved / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="saved is damaged"):
        export_peft(saved, arch, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "saved"]


# ------------------------------------------------------------------------------------------------ in

incoming = pytest.mark.parametrize(
    ("base", "case"), [*(("llama", case) for case in INCOMING), ("qwen2", "all"), ("qwen3", "query and value")]
)


@incoming
def test_adapters_of_peft_load(base: str, case: str, base_of, peft_of, groups) -> None:
    folder = base_of(base)
    adapters, wanted = peft_of(base, case)
    chunk, arch = network(folder, groups)
    add_adapters([chunk], arch, adapters, folder, groups)
    assert off(wanted, base_logits(folder)) > 0.1
    assert off(megatron_logits(chunk), wanted) < FP32_TOLERANCE
    with lora.adapters_off([chunk]):
        assert off(megatron_logits(chunk), base_logits(folder)) < FP32_TOLERANCE


@incoming
def test_and_come_back(base: str, case: str, base_of, peft_of, groups, tmp_path: Path) -> None:
    """Through a checkpoint of ours; modules whose A differed then share a larger one, and mean the same."""
    folder = base_of(base)
    adapters, wanted = peft_of(base, case)
    chunk, arch = network(folder, groups)
    add_adapters([chunk], arch, adapters, folder, groups)
    saved = save(chunk, folder, adapter_spec(adapters, arch), tmp_path / "saved", groups)
    export_peft(saved, arch, tmp_path / "out", base="some/base")
    back = loaded_by_peft(folder, tmp_path / "out")
    assert off(logits_of(back), wanted) < FP32_TOLERANCE
    assert back.peft_config["default"].base_model_name_or_path == "some/base"


def test_an_a_that_modules_share_stays_one(base_of, groups, tmp_path: Path) -> None:
    """A round trip of our own adapters changes no bit and no rank."""
    folder, spec = base_of("llama"), OUTGOING["all"]
    chunk, arch = adapted(folder, spec, groups)
    export_peft(save(chunk, folder, spec, tmp_path / "saved", groups), arch, tmp_path / "out")
    assert adapter_spec(tmp_path / "out", arch) == spec
    again, _ = network(folder, groups)
    add_adapters([again], arch, tmp_path / "out", folder, groups)
    assert torch.equal(megatron_logits(again), megatron_logits(chunk))
