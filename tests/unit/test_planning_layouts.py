"""Which layouts are proposed, how they are ranked, and what is said where there is none."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import yaml

from nemo_kto.config.checks import check, check_recompute
from nemo_kto.config.layout import check_layout
from nemo_kto.config.load import load_config
from nemo_kto.config.schema import Config
from nemo_kto.data.plan import micro_batches_of_pipeline, packed
from nemo_kto.errors import ConfigError
from nemo_kto.planning.duration import step_flops, step_time
from nemo_kto.planning.layouts import candidates, plain_layouts, predict
from nemo_kto.planning.plan import make_plan, overrides
from nemo_kto.planning.request import GB, Job, Layout, Machine
from nemo_kto.planning.shape import SIZE_GROUPS

H100 = Machine()
JOBS = {
    "7b": Job(SIZE_GROUPS["7b"], 8, 8, 4096, 64),
    "8b-lora": Job(SIZE_GROUPS["8b"], 2, 2, 4096, 6, lora_dim=16),
    "8b-fp32": Job(SIZE_GROUPS["8b"], 16, 8, 2048, 48, bf16=False, optimizer="adamw"),
    "13b": Job(SIZE_GROUPS["13b"], 16, 8, 4096, 64),
    "70b": Job(SIZE_GROUPS["70b"], 64, 8, 4096, 64),
    "qwen": Job(replace(SIZE_GROUPS["8b"], qk_norm=True, tied_embeddings=True, num_query_groups=2), 12, 4, 999, 36),
}
MOST_LAYOUTS = 5000


def put(node: object, path: list[str], value: object) -> object:
    """A config with one key changed; fails where the key does not exist."""
    name, *rest = path
    return replace(node, **{name: put(getattr(node, name), rest, value) if rest else value})


def with_overrides(config: Config, words: list[str]) -> Config:
    for key, value in (word.split("=") for word in words):
        config = put(config, key.split("."), yaml.safe_load(value))
    return config


@pytest.fixture(scope="module")
def always(tmp_path_factory) -> list[str]:
    """What a run needs besides a layout."""
    start = tmp_path_factory.mktemp("model")
    return [f"pretrained_checkpoint.restore_from_path={start}", "model.data.data_prefix.train=[train.jsonl]"]


@pytest.mark.parametrize("name", JOBS)
def test_every_layout_is_accepted_by_the_program(name, always):
    """Also those that do not fit: on larger GPUs they do."""
    job, config = JOBS[name], load_config(always)
    found = candidates(job, H100)
    assert len({candidate.layout for candidate in found}) > 5
    for layout in (candidate.layout for candidate in found):
        assert layout.tp * layout.pp * layout.dp == job.world
        run = with_overrides(config, overrides(job, layout))
        check(run, job.world)
        check_recompute(job.arch, run.model)
        check_layout(job.arch, tensor_parallel=layout.tp, pipeline_parallel=layout.pp)


def test_what_is_to_be_pasted_is_understood(always):
    for job in JOBS.values():
        plan = make_plan(job, replace(H100, memory=140 * GB))
        assert all(candidate.fits for candidate in plan.fitting)
        words = overrides(job, plan.best.layout)
        config = load_config([*always, *words])
        assert config == with_overrides(config, words)
        check(config, job.world)


def test_what_the_config_refuses_is_not_proposed():
    """KV heads bound TP, layers PP, the batch DP; SP needs TP and rows that divide."""
    found = list(plain_layouts(JOBS["qwen"]))
    assert {layout.tp for layout in found} == {1, 2}
    assert {layout.pp for layout in found} <= {1, 2, 4}
    assert not any(layout.sequence_parallel for layout in found)  # 999 is odd
    assert any(layout.sequence_parallel for layout in plain_layouts(replace(JOBS["qwen"], seq_length=998)))
    assert all(36 % (layout.dp * layout.micro_batch_size) == 0 for layout in found)


def test_tensor_parallel_groups_stay_in_their_node():
    assert {layout.tp for layout in plain_layouts(replace(JOBS["70b"], gpus_per_node=4))} == {1, 2, 4}


@pytest.mark.parametrize(
    ("pp", "rows", "length", "micro"), [(1, 8, 64, 2), (1, 9, 50, 4), (4, 64, 64, 1), (4, 16, 900, 8)]
)
def test_micro_batches_are_counted_as_packing_makes_them(pp, rows, length, micro):
    job = Job(SIZE_GROUPS["8b"], pp, 8, 1024, rows, mean_length=length)
    lengths = np.full((rows, 2), length)
    (share,) = packed(lengths, 1, micro * 1024, micro_batches_of_pipeline(rows * length, pp))
    assert Layout(1, pp, 1, False, micro).micro_batches(job) == len(share)


def test_70b_on_1024_gpus_looks_at_few_layouts():
    """No time is asserted: each layout is some fifty lines of arithmetic, and there are no more than these."""
    plan = make_plan(Job(SIZE_GROUPS["70b"], 1024, 8, 4096, 1024), H100)
    assert 100 < plan.evaluated < MOST_LAYOUTS
    assert plan.best.fullest.total <= H100.usable


def test_the_first_is_within_a_twentieth_of_the_quickest_and_needs_least_there():
    plan = make_plan(JOBS["70b"], H100)
    close = [c for c in plan.fitting if c.time.total < plan.quickest * 1.05]
    assert plan.best in close
    assert plan.best.fullest.total == min(c.fullest.total for c in close)


def test_layers_are_recomputed_only_where_it_does_not_fit_without():
    job = JOBS["13b"]
    for candidate in candidates(job, H100):
        layout = candidate.layout
        if layout.recompute is None:
            continue
        assert not predict(job, replace(layout, recompute=None, recompute_layers=0), H100).fits
        if layout.recompute == "block" and candidate.fits and layout.recompute_layers > 1:
            fewer = replace(layout, recompute_layers=layout.recompute_layers - 1)
            assert not predict(job, fewer, H100).fits


def test_no_room_says_the_least_and_what_would_do():
    job = Job(SIZE_GROUPS["70b"], 8, 8, 4096, 64)
    with pytest.raises(ConfigError) as refused:
        make_plan(job, H100)
    text = str(refused.value)
    least = min(candidate.fullest.total for candidate in candidates(job, H100))
    assert f"the least that any needs is {least / GB:.1f} GB" in text
    gpus = int(re.search(r"or (\d+) GPUs", text)[1])
    assert make_plan(replace(job, world=gpus), H100).fitting
    memory = int(re.search(r"GPUs of (\d+) GB \(--gpu-memory\)", text)[1])
    assert make_plan(job, replace(H100, memory=memory * GB)).fitting
    assert ("--peft lora" in text) == bool([c for c in candidates(replace(job, lora_dim=32), H100) if c.fits])


def test_a_part_of_a_node_may_need_the_whole():
    with pytest.raises(ConfigError, match=r"or 8 GPUs \(--gpus\)"):
        make_plan(replace(JOBS["7b"], world=1), H100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 7, "world": 1024}, "--global-batch-size 7 is a multiple of none"),
        ({"global_batch_size": 1}, "give at least 2"),
        ({"world": 12}, "--gpus 12 is not a multiple of --gpus-per-node 8"),
        ({"seq_length": 1 << 20}, "max_position_embeddings"),
        ({"mean_length": 5000}, "--mean-length 5000"),
    ],
)
def test_what_no_layout_could_mend_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(replace(JOBS["70b"], **changes), H100)


def test_operations_of_a_step_are_six_forwards():
    """Three without gradient and one with a backward of twice its size: 12 per weight and token, but for attention."""
    job = replace(JOBS["7b"], seq_length=1)
    weights = 6_738_415_616 - 32000 * 4096
    assert step_flops(job) == pytest.approx(12 * weights * 64, rel=0.001)


def seconds(layout: Layout, job: Job = JOBS["70b"], machine: Machine = H100) -> dict[str, float]:
    fullest = predict(job, layout, machine).fullest
    return step_time(job, layout, machine, fullest).to_json()


def test_time_goes_where_it_should():
    flat, deep = seconds(Layout(8, 1, 8, True, 1)), seconds(Layout(8, 8, 1, True, 1))
    assert flat["bubble"] == flat["pipeline"] == deep["data_parallel"] == 0
    assert deep["bubble"] > 0 < deep["pipeline"]
    assert flat["data_parallel"] > 0
    assert seconds(Layout(1, 8, 8, False, 1))["tensor_parallel"] == 0
    again = seconds(Layout(8, 1, 8, True, 1, "uniform", 1))
    assert 1.1 < again["compute"] / flat["compute"] < 1.25  # a seventh forward beside six
    slow = seconds(Layout(8, 1, 8, True, 1), machine=replace(H100, flops=H100.flops / 2))
    assert slow["compute"] == pytest.approx(2 * flat["compute"])


def test_a_bubble_is_the_turns_that_a_stage_waits():
    """8 stages wait for 7 turns of three passes: reference, KL, and training, which takes three forwards' time.

    Busy are 3 x 64 turns of a forward and 64 of training.
    """
    job, layout = JOBS["70b"], Layout(8, 8, 1, True, 1)
    found = seconds(layout)
    busy = found["compute"] + found["tensor_parallel"] + found["pipeline"]
    assert layout.micro_batches(job) == 64
    assert found["bubble"] / busy == pytest.approx(7 * (1 + 1 + 3) / (64 * (3 + 3)), rel=0.02)
