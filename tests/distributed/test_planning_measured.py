"""Predictions of `nemo-kto plan` against what ranks really hold: the product's network and optimizer over gloo."""

from __future__ import annotations

from pathlib import Path

import planning_cases as measured
import pytest
import tiny
import training_kit as kit
from harness import Worlds
from planning_cases import LENGTH, MICRO_BATCHES, ROWS, Case

from nemo_kto.config.architecture import Architecture, read_architecture
from nemo_kto.planning.activations import stage_bytes
from nemo_kto.planning.memory import static_bytes
from nemo_kto.planning.request import Job, Layout

pytestmark = pytest.mark.distributed

SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
MODELS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 48, "tie_word_embeddings": True},
}
DIST = "distributed_fused_adam"
UNIFORM = {"recompute": "uniform", "recompute_layers": 2}
BLOCK = {"recompute": "block", "recompute_layers": 1}
CASES = {
    1: {
        "fp32": Case(bf16=False),
        "bf16": Case(),
        "bf16-tied": Case(model="tied"),
        "bf16-dist": Case(optimizer=DIST),
        "fp32-dist": Case(optimizer=DIST, bf16=False, model="qwen2"),
        "qwen3": Case(model="qwen3"),
        "lora": Case(lora_dim=16),
        "lora-fp32": Case(lora_dim=16, bf16=False, model="tied"),
        "uniform": Case(**UNIFORM),
        "block": Case(**BLOCK),
    },
    2: {
        "tp2": Case(tp=2),
        "tp2sp": Case(tp=2, sequence_parallel=True),
        "tp2-qwen2-fp32": Case(tp=2, bf16=False, model="qwen2"),
        "tp2sp-qwen3": Case(tp=2, sequence_parallel=True, model="qwen3"),
        "tp2sp-uniform": Case(tp=2, sequence_parallel=True, **UNIFORM),
        "tp2-lora": Case(tp=2, lora_dim=16),
        "tp2sp-lora": Case(tp=2, lora_dim=16, sequence_parallel=True),
        "pp2": Case(pp=2),
        "pp2-tied-fp32": Case(pp=2, bf16=False, model="tied"),
        "pp2-lora": Case(pp=2, lora_dim=16),
        "pp2-block": Case(pp=2, **BLOCK),
        "dp2": Case(),
        "dp2-dist": Case(optimizer=DIST),
        "dp2-dist-fp32": Case(optimizer=DIST, bf16=False, model="tied"),
        "dp2-lora-dist": Case(optimizer=DIST, lora_dim=16),
    },
    4: {
        "tp2pp2-dist": Case(tp=2, pp=2, optimizer=DIST),
        "pp2dp2-dist-tied": Case(pp=2, optimizer=DIST, model="tied"),
        "tp2spdp2-dist-qwen3": Case(tp=2, sequence_parallel=True, optimizer=DIST, model="qwen3"),
        "pp4": Case(pp=4, bf16=False),
    },
}
SLOW = {1: pytest.mark.slow, 4: pytest.mark.slow}
"""Two ranks have every formula at least once."""
every_case = pytest.mark.parametrize(
    ("world", "name"),
    [pytest.param(world, name, marks=SLOW.get(world, ())) for world, cases in CASES.items() for name in cases],
)
PADDED = 0.02
"""What the distributed optimizer's alignment adds here: parameters begin at multiples of 64 elements and buckets end
at multiples of 128 and DP, in networks of 0.3 million elements and more per rank. Nothing else differs."""
LEFT_OVER = 0.05
"""Of all tensors that are alive: rotary frequencies, step counters, and what a rank received last; on the smallest
ranks here that was 3 %."""
KERNELS = 0.03
"""For what is not counted: cosines and sines, token ids, masks, and, of LoRA, the narrow tensors between A and B."""


def on_ranks(rank: int, world_size: int, root: Path) -> dict:
    cases = {
        name: (lambda _rank, _root, case=case: measured.measure(case, _root))
        for name, case in CASES[world_size].items()
    }
    return kit.each(cases, rank, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("planning")
    for name, settings in MODELS.items():
        tiny.make_model(root / name, **{**SIZES, **settings})
    return root


@pytest.fixture(scope="module")
def worlds(root):
    return Worlds(on_ranks, root, timeout=400)


def job_and_layout(world: int, case: Case, arch: Architecture) -> tuple[Job, Layout]:
    dp = world // (case.tp * case.pp)
    batch = ROWS * MICRO_BATCHES * dp
    job = Job(arch, world, world, LENGTH, batch, case.bf16, case.optimizer, case.lora_dim)
    recompute = (case.recompute, case.recompute_layers)
    return job, Layout(case.tp, case.pp, dp, case.sequence_parallel, ROWS, *recompute)


@every_case
def test_weights_gradients_and_optimizer_state(world, name, root, worlds):
    case = CASES[world][name]
    arch = read_architecture(root / case.model)
    job, layout = job_and_layout(world, case, arch)
    for found in kit.of(worlds(world), name):
        expected = static_bytes(job, layout, found["stage"])
        assert found["parameters"] == expected.parameters
        assert found["trained"] == expected.trained
        for part in ("weights", "gradients", "optimizer"):
            assert found[part] == pytest.approx(getattr(expected, part), rel=PADDED), part
        assert found["everything"] == pytest.approx(expected.total, rel=LEFT_OVER)


@every_case
def test_activations(world, name, root, worlds):
    case = CASES[world][name]
    arch = read_architecture(root / case.model)
    job, layout = job_and_layout(world, case, arch)
    for found in kit.of(worlds(world), name):
        expected = stage_bytes(job, layout, found["stage"]) + more_on_a_cpu(job, layout, found["stage"])
        assert found["activations"] == pytest.approx(expected, rel=KERNELS)


def more_on_a_cpu(job: Job, layout: Layout, stage: int) -> int:
    """Bytes that torch's unfused kernels keep besides, and what the hooks do not see.

    A norm keeps its input in float32 instead of its own dtype, and, where its weight is trained, the normed input in
    float32 too. SwiGLU keeps two more tensors of F columns. The stage's output is held by the schedule.
    """
    arch, size = job.arch, job.weight_bytes
    tokens = ROWS * LENGTH
    hidden = arch.hidden_size * tokens // layout.sequence_shards
    wide = 8 if job.lora_dim is None else 4
    norm, heads = (wide - size) * hidden, (arch.num_attention_heads + arch.num_query_groups) * arch.head_dim
    layer = 2 * norm + (2 * arch.ffn_hidden_size * size + wide * heads * arch.qk_norm) * tokens // layout.tp
    layers, again = arch.num_layers // layout.pp, layout.recompute_layers
    flights = min(MICRO_BATCHES, layout.pp - stage)
    if layout.recompute == "uniform":
        return again * layer + size * hidden
    more = (flights * (layers - again)) * layer
    if job.lora_dim is not None and stage == 0:
        more -= flights * wide * hidden  # nothing before the first adapter is trained, the first norm keeps no input
    return more + (norm if stage == layout.pp - 1 else -flights * size * hidden)
