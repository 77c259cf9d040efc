"""Megatron computes what transformers computes: every family, one rank, one process."""

from __future__ import annotations

import dataclasses
import json

import hf_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_kto.checkpoint.hf_export import copy_companions, export_hf, plan
from nemo_kto.checkpoint.hf_load import load_hf
from nemo_kto.config.architecture import read_architecture, to_hf_config
from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.gpt.build import PlainNetwork, build_gpt, unwrap
from nemo_kto.gpt.rope import inverse_frequencies

LENGTHS = [100, 37, 81]
FP32_TOLERANCE = 1e-4
"""|logit| is about 4; kernels may add up in another order, which costs a few ulp (5e-7) a layer over 4 layers. The
same kernels usually give 0. Anything wrong with the mathematics shows as 1e-2 and more (see the negative controls)."""
PACKED_TOLERANCE = 1e-5
"""Hidden states are about 1; fp32 GEMM rows move by up to 3e-6 with the number of rows (measured, design.md)."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Directory of a case's model, made on first use."""
    root = tmp_path_factory.mktemp("hf")
    return lambda case: root / case if (root / case).is_dir() else hf_models.make(case, root)


def megatron(folder, groups, *, bf16=False, arch=None, **network):
    arch = arch or read_architecture(folder)
    chunks = build_gpt(arch, PlainNetwork(**network), bf16=bf16, groups=groups)
    load_hf(chunks, arch, folder, groups)
    return chunks[0].eval()


def megatron_logits(model, tokens, vocab_size):
    with torch.no_grad():
        hidden = model(tokens, None, None)
        return unwrap(model).logits(hidden).transpose(0, 1)[..., :vocab_size], hidden


@pytest.mark.parametrize("case", hf_models.CASES)
def test_logits_equal_transformers(case, model_dir, groups):
    folder = model_dir(case)
    arch = read_architecture(folder)
    tokens, mask = hf_models.batch(arch.vocab_size, LENGTHS)
    ours, hidden = megatron_logits(megatron(folder, groups), tokens, arch.vocab_size)
    theirs = hf_models.hf_logits(folder, tokens, mask)
    assert hidden.shape == (100, 3, 64)
    assert theirs.abs().max() > 1  # random weights that would hide nothing
    assert (ours - theirs)[mask].abs().max() < FP32_TOLERANCE


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama3", {"rope_scaling": None}),
        ("llama_linear", {"rope_scaling": None}),
        ("llama3", {"rope_theta": 10000.0}),
        ("llama3", {"norm_epsilon": 1e-2}),
    ],
)
def test_each_number_of_the_config_matters(case, change, model_dir, groups):
    """Negative controls: the comparison sees what it is there to see."""
    folder = model_dir(case)
    arch = read_architecture(folder)
    tokens, mask = hf_models.batch(arch.vocab_size, LENGTHS)
    theirs = hf_models.hf_logits(folder, tokens, mask)
    wrong = megatron(folder, groups, arch=dataclasses.replace(arch, **change))
    ours, _ = megatron_logits(wrong, tokens, arch.vocab_size)
    assert (ours - theirs)[mask].abs().max() > 100 * FP32_TOLERANCE


@pytest.mark.parametrize("case", ["llama3", "llama_linear", "qwen3"])
def test_inverse_frequencies_equal_transformers(case, model_dir):
    import transformers

    folder = model_dir(case)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours = inverse_frequencies(read_architecture(folder), torch.device("cpu"))
    # one ulp of fp32: the blend of Llama 3's middle band is written with other roundings
    torch.testing.assert_close(ours, model.model.rotary_emb.inv_freq, rtol=2e-7, atol=0)


def test_bfloat16_stays_bfloat16_and_is_as_exact_as_transformers(model_dir, groups):
    folder = model_dir("qwen3")
    arch = read_architecture(folder)
    tokens, mask = hf_models.batch(arch.vocab_size, LENGTHS)
    exact = hf_models.hf_logits(folder, tokens, mask)[mask]
    ours, hidden = megatron_logits(megatron(folder, groups, bf16=True), tokens, arch.vocab_size)
    theirs = hf_models.hf_logits(folder, tokens, mask, torch.bfloat16)[mask]
    assert hidden.dtype == torch.bfloat16
    error, their_error = ((logits.float() - exact).square().mean().sqrt() for logits in (ours[mask], theirs))
    # bf16 rounds at other places in the two implementations, so errors agree in size, not in value
    assert error < 1.5 * their_error


def test_recomputed_activations_change_nothing(model_dir, groups):
    """Same operations in the same order: bit-equal gradients."""
    tokens, _ = hf_models.batch(399, LENGTHS)
    full = {"granularity": "full", "method": "uniform", "num_layers": 1}
    gradients = []
    for options in ({}, full, {"granularity": "selective"}):
        network = {f"activations_checkpoint_{key}": value for key, value in options.items()}
        model = megatron(model_dir("qwen3"), groups, **network).train()
        model(tokens, None, None).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for recomputed in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], recomputed, strict=True))


@pytest.mark.parametrize("lengths", [[40, 17, 33], [25]])
def test_packed_rows_equal_rows_apart(lengths, model_dir, groups):
    from megatron.core.packed_seq_params import PackedSeqParams

    model = megatron(model_dir("llama3"), groups)
    tokens, mask = hf_models.batch(399, lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    longest = max(lengths)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    with torch.no_grad():
        apart = model(tokens, None, None).transpose(0, 1)[mask]
        together = model(tokens[mask][None], None, None, packed_seq_params=packed)
    assert together.shape == (sum(lengths), 1, 64)
    assert (together.squeeze(1) - apart).abs().max() < PACKED_TOLERANCE


def test_untouched_parameters_are_finite(model_dir, groups):
    """Megatron leaves them as the allocator found them; a NaN in a padding row would reach the optimizer."""
    arch = read_architecture(model_dir("qwen2"))
    (model,) = build_gpt(arch, PlainNetwork(), bf16=True, groups=groups)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.full_like(parameter, float("norm" in name))), name


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"context_parallel_size": 2}, "context_parallel_size=2 is not supported"),
        ({"virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size is not supported"),
        ({"sequence_parallel": True}, "sequence_parallel needs"),
    ],
)
def test_unbuilt_features_are_refused(network, message, model_dir, groups):
    with pytest.raises(ConfigError, match=message):
        build_gpt(read_architecture(model_dir("qwen2")), PlainNetwork(**network), bf16=False, groups=groups)


def test_masks_are_refused(model_dir, groups):
    tokens, mask = hf_models.batch(399, [8])
    with pytest.raises(ValueError, match="takes no mask"):
        megatron(model_dir("llama3"), groups)(tokens, None, mask[:, None, None])


@pytest.mark.parametrize("equal", [True, False])
def test_tied_model_that_stores_its_head_too(equal, model_dir, groups, tmp_path):
    folder = model_dir("llama_tied")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[398, 63] += 0.0 if equal else 1e-3
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    if equal:
        megatron(tmp_path, groups)
        return
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        megatron(tmp_path, groups)


@pytest.mark.parametrize("case", ["llama3", "qwen3"])
def test_export_is_a_model_that_transformers_loads(case, model_dir, groups, tmp_path):
    import transformers

    folder, out = model_dir(case), tmp_path / "out"
    arch = read_architecture(folder)
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "left_by_a_torn_export").touch()
    for _ in range(2):  # the second replaces the first
        export_hf([megatron(folder, groups)], arch, groups, folder, out, dtype=torch.bfloat16)
    stored, written = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: t.to(torch.bfloat16).tolist() for name, t in stored.items()} == {
        name: t.tolist() for name, t in written.items()
    }
    assert read_architecture(out) == arch
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert transformers.AutoTokenizer.from_pretrained(out)("a film").input_ids
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == 2
    assert transformers.AutoModelForCausalLM.from_pretrained(out, torch_dtype="auto").dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "left_by_a_torn_export").exists()


def test_export_refuses_what_is_not_its_own(model_dir, groups, tmp_path):
    folder = model_dir("llama3")
    model, arch = megatron(folder, groups), read_architecture(folder)
    (tmp_path / "precious").touch()
    with pytest.raises(CheckpointError, match="not empty and not an earlier export"):
        export_hf([model], arch, groups, folder, tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        export_hf([model], arch, groups, folder, tmp_path / "precious")
    with pytest.raises(CheckpointError, match="another architecture"):
        export_hf([model], arch, groups, model_dir("qwen3"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("case", hf_models.CASES)
def test_config_made_without_a_source_means_the_same_to_transformers(case, model_dir, tmp_path):
    folder = model_dir(case)
    arch = read_architecture(folder)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(arch, "float32")))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    copy_companions(folder, tmp_path)
    tokens, mask = hf_models.batch(arch.vocab_size, [60])
    assert torch.equal(hf_models.hf_logits(tmp_path, tokens, mask), hf_models.hf_logits(folder, tokens, mask))


def test_shards_are_planned_from_shapes(model_dir):
    arch = read_architecture(model_dir("llama3"))
    assert [shard.file for shard in plan(arch, 1, 4, 10**9)] == ["model.safetensors"]
    shards = plan(arch, 2, 4, 200_000)
    assert shards[0].file == f"model-00001-of-{len(shards):05d}.safetensors"
    assert [shard.stage for shard in shards] == sorted(shard.stage for shard in shards)
    for shard in shards:
        size = sum(4 * torch.Size(shape).numel() for rule in shard.rules for shape in rule.shapes)
        assert size <= 200_000
        layers = {rule.layer for rule in shard.rules if rule.layer is not None}
        assert layers <= ({0, 1} if shard.stage == 0 else {2, 3})
