"""Sizes of networks and of what a rank holds, against numbers known from elsewhere or counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nemo_kto.config.architecture import to_hf_config
from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.planning import activations, memory
from nemo_kto.planning.request import GB, Job, Layout, Machine
from nemo_kto.planning.shape import SIZE_GROUPS, adapter_elements, read_shape, stage_elements

TOTALS = {"7b": 6_738_415_616, "8b": 8_030_261_248, "13b": 13_015_864_320, "70b": 70_553_706_496}
"""Parameters as the published checkpoints have them."""
ONE = Layout(1, 1, 1, False, 1)
SMALL = replace(SIZE_GROUPS["8b"], num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=4)
SMALL = replace(SMALL, num_query_groups=2, head_dim=2, vocab_size=101)


def job(**changes) -> Job:
    return replace(Job(SIZE_GROUPS["8b"], 8, 8, 4096, 64), **changes)


@pytest.mark.parametrize("group", TOTALS)
def test_size_groups_have_the_published_number_of_parameters(group):
    assert stage_elements(SIZE_GROUPS[group], 1, 1, 0) == TOTALS[group]


def test_a_small_network_counted_by_hand():
    """qkv 8 x 16, projection 8 x 8, gate and up 8 x 32, down 16 x 8, two norms of 8."""
    layer = 128 + 64 + 256 + 128 + 16
    assert stage_elements(SMALL, 1, 1, 0) == 2 * layer + 8 + 2 * 101 * 8
    assert stage_elements(replace(SMALL, tied_embeddings=True), 1, 1, 0) == 2 * layer + 8 + 101 * 8
    sharded = (layer - 16) // 2 + 16
    assert stage_elements(SMALL, 2, 2, 0) == sharded + 51 * 8  # the vocabulary is padded to 102
    assert stage_elements(replace(SMALL, tied_embeddings=True), 2, 2, 1) == sharded + 8 + 51 * 8  # a copy of its own
    assert stage_elements(replace(SMALL, qkv_bias=True), 1, 1, 0) - stage_elements(SMALL, 1, 1, 0) == 2 * 16
    assert stage_elements(replace(SMALL, qk_norm=True), 1, 1, 0) - stage_elements(SMALL, 1, 1, 0) == 2 * 4


def test_adapters_counted_by_hand():
    """A and B of rank 3: qkv (8, 16), projection (8, 8), gate and up (8, 32), down (16, 8)."""
    assert adapter_elements(SMALL, 1, 3) == 3 * (24 + 16 + 40 + 24)
    assert adapter_elements(SMALL, 2, 3) == 3 * ((8 + 8) + (4 + 8) + (8 + 16) + (8 + 8))


@pytest.mark.parametrize(
    ("bf16", "optimizer", "per_parameter"),
    [
        (True, "adamw", (2, 4, 12)),
        (True, "distributed_fused_adam", (2, 4, 3)),
        (False, "adamw", (4, 4, 8)),
        (False, "distributed_fused_adam", (4, 4, 2)),
    ],
)
def test_bytes_per_parameter(bf16, optimizer, per_parameter):
    found = memory.static_bytes(job(bf16=bf16, optimizer=optimizer), Layout(2, 1, 4, True, 1), 0)
    assert (found.weights, found.gradients, found.optimizer) == tuple(n * found.parameters for n in per_parameter)


def test_lora_trains_adapters_alone():
    full = memory.static_bytes(job(), ONE, 0)
    found = memory.static_bytes(job(lora_dim=16), ONE, 0)
    adapters = 32 * adapter_elements(SIZE_GROUPS["8b"], 1, 16)
    assert found.trained == adapters
    assert found.weights == full.weights + 4 * adapters
    assert (found.gradients, found.optimizer) == (4 * adapters, 8 * adapters)


def test_a_layer_of_an_ungrouped_network_beside_the_papers():
    """The paper has 34 s b h bytes without scores, 2 of them dropout masks.

    With F = 4 H: 8 more for SwiGLU's third F columns, and 4 for q and k, which stay before and after RoPE.
    """
    arch = replace(SIZE_GROUPS["7b"], ffn_hidden_size=4 * 4096)
    statistics = 8 + 4 * 32  # of two norms and of attention's rows
    assert activations.layer_bytes(job(arch=arch), ONE, 1) == (34 - 2 + 8 + 4) * 4096 + statistics


@pytest.mark.parametrize("stage", range(4))
def test_a_pipeline_holds_as_many_micro_batches_as_stages_come_after(stage):
    layout, hidden = Layout(1, 4, 2, False, 1), 4096 * 4096 * 2
    one = 8 * activations.layer_bytes(job(), layout, 4096) + hidden
    assert activations.stage_bytes(job(), layout, stage) == (4 - stage) * one + (hidden if stage == 3 else 0)
    few = replace(job(), global_batch_size=4)  # 2 micro-batches
    assert activations.stage_bytes(few, layout, stage) == min(2, 4 - stage) * one + (hidden if stage == 3 else 0)


def test_recomputing_keeps_inputs_and_one_unit():
    plain, tokens, hidden = Layout(2, 1, 4, True, 1), 4096, 4096 * 4096 * 2 // 2
    layer = activations.layer_bytes(job(), plain, tokens)
    assert activations.stage_bytes(job(), plain, 0) == 32 * layer + hidden + 2 * hidden  # final norm and head
    uniform = replace(plain, recompute="uniform", recompute_layers=4)
    assert activations.stage_bytes(job(), uniform, 0) == 7 * hidden + 4 * layer
    every = replace(plain, recompute="block", recompute_layers=32)
    assert activations.stage_bytes(job(), every, 0) == 31 * hidden + layer
    block = replace(plain, recompute="block", recompute_layers=10)
    assert activations.stage_bytes(job(), block, 0) == 10 * hidden + 22 * layer + 3 * hidden


def test_the_head_never_needs_more_logits_than_a_chunk():
    short, long = (activations.head_chunk_bytes(job(seq_length=n), ONE) for n in (256, 65536))
    assert short == 256 * 128256 * 6
    assert long <= 1.5 * activations.CHUNK_BYTES
    assert not activations.remakes_logits(job(seq_length=256), ONE)
    assert activations.remakes_logits(job(), ONE)


def test_constants_are_those_of_the_program():
    """Planning imports no torch, so it has them written down again."""
    from nemo_kto.distributed import logprobs
    from nemo_kto.reference import keeping

    assert (activations.CHUNK_BYTES, memory.SWAP_RESERVE) == (logprobs.CHUNK_BYTES, keeping.RESERVE)


@pytest.mark.parametrize(
    ("changes", "layout", "gigabytes", "way"),
    [
        ({}, Layout(2, 1, 4, True, 1), 80, "device"),
        ({}, Layout(2, 1, 4, True, 1), 45, "host"),
        ({}, Layout(8, 1, 1, True, 1), 20, "masters"),
        ({"optimizer": "adamw"}, Layout(2, 1, 4, True, 1), 80, "masters"),
        ({"bf16": False}, Layout(8, 1, 1, True, 1), 19, "host"),
        ({"lora_dim": 8}, Layout(2, 1, 4, True, 1), 80, "none"),
    ],
)
def test_where_the_policy_waits(changes, layout, gigabytes, way):
    run = job(**changes)
    rank = memory.rank_memory(run, layout, Machine(memory=gigabytes * GB), 0)
    assert rank.restore == way
    assert rank.swap_device == (rank.static.weights if way == "device" else 0)
    copies = {"none": 0, "host": 2}.get(way, 1)
    assert rank.swap_host >= copies * rank.static.weights * (way != "none")
    assert rank.swap_host < 2 * copies * rank.static.weights or way == "none"


def test_the_total_is_the_larger_of_training_and_scoring():
    rank = memory.rank_memory(job(seq_length=64), Layout(1, 1, 8, False, 1), Machine(memory=200 * GB), 0)
    assert rank.total == rank.static.total + rank.swap_device + rank.scoring
    rank = memory.rank_memory(job(), Layout(2, 1, 4, True, 4), Machine(), 0)
    assert rank.total == rank.static.total + rank.activations + max(rank.head, rank.work)


def test_models_are_read_by_name_directory_and_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(SIZE_GROUPS["70b"], "bfloat16")))
    for name in ("70B", str(tmp_path), str(tmp_path / "config.json")):
        assert stage_elements(read_shape(name), 1, 1, 0) == TOTALS["70b"]
    with pytest.raises(ConfigError, match="7b, 8b, 13b, 70b"):
        read_shape("9b")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="model_type"):
        read_shape(str(tmp_path))
