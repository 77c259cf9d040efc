"""Megatron's silent mistakes that this product works around: each is shown, so that a fix upstream is noticed.

Where the first assertion of a test fails, upstream may have mended it: then the workaround can go.
"""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata

import pytest
import tiny
import training_kit as kit
import upstream_cases as cases
from harness import run_ranks

from nemo_kto.config.checks import check
from nemo_kto.config.load import load_config
from nemo_kto.errors import ConfigError

pytestmark = pytest.mark.distributed

torch_adam = pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex")),
    reason="with Transformer Engine or Apex, Megatron uses their Adam",
)


def two_ranks(rank, root):
    todo = {
        name: getattr(cases, name)
        for name in (
            *("shared_step", "key_error", "no_state_yet", "default_sharding", "leaf_views", "padded_buckets"),
            *("divided_loss", "virtual_stages"),
        )
    }
    return kit.each(todo, rank, root)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    root = tmp_path_factory.mktemp("upstream")
    tiny.make_model(root / "tied", tie_word_embeddings=True, **kit.SIZES)
    tiny.make_model(root / "other", seed=1, tie_word_embeddings=True, **kit.SIZES)
    return run_ranks(2, two_ranks, root, timeout=400)


@torch_adam
def test_a_load_gives_all_parameters_one_step(two):
    """Silent: the first loss is right, and from the second on every update has a wrong bias correction."""
    for found in kit.of(two, "shared_step"):
        upstream, ours, expected = found["upstream"], found["ours"], found["expected"]
        assert upstream["parameters"] > 1
        assert upstream["tensors"] == 1
        assert upstream["step"] == {2.0 + upstream["parameters"]}, "Adam advances it once for each parameter"
        assert upstream["records"][0] == expected[0]
        assert abs(upstream["records"][1]["loss"] / expected[1]["loss"] - 1) > 1e-5, "beyond any rounding"
        assert ours["tensors"] == ours["parameters"]
        assert ours["step"] == {3.0}
        assert ours["records"] == expected


@torch_adam
def test_a_load_asks_for_a_step_that_its_loader_drops(two):
    for found in kit.of(two, "key_error"):
        assert found["upstream"] == "KeyError('step')"
        assert found["ours"]


@torch_adam
def test_a_state_dict_asserts_before_the_first_step(two):
    assert [found["upstream"] for found in kit.of(two, "no_state_yet")] == ["AssertionError"] * 2
    assert [found["ours"] for found in kit.of(two, "no_state_yet")] == [""] * 2


def test_the_default_sharding_cannot_be_saved(two):
    for found in kit.of(two, "default_sharding"):
        assert "flattened_range" in found["upstream"]
        assert found["ours"] == "fully_reshardable"


@torch_adam
def test_masters_that_are_parameters_are_written_as_leaves(two):
    for found in kit.of(two, "leaf_views"):
        assert "leaf" in found["upstream"]
        assert found["ours"] == ""


def test_padding_between_buckets_shifts_what_is_saved(two):
    """Silent: nothing is missing, but masters and moments behind the padding are those of their neighbours."""
    ranks = kit.of(two, "padded_buckets")
    assert any(sum(found["padding"][:-1]) for found in ranks), "no padding, nothing to see"
    assert not all(found["upstream"] for found in ranks)
    assert all(found["ours"] for found in ranks)


def test_the_schedule_divides_a_returned_loss_in_place(two):
    """Silent: a metric that was not cloned is too small by the number of micro-batches."""
    for found in kit.of(two, "divided_loss"):
        number = len(found["returned"])
        assert number > 1
        assert found["kept"] == pytest.approx([loss / number for loss in found["returned"]], rel=1e-6)  # float32
        assert found["ours"] == pytest.approx(sum(found["addends"]), rel=1e-12)  # float64


def test_virtual_stages_with_batched_messages_train_on_something_else(two):
    """Silent: of two stages each is before and behind the other, and batched messages are taken for one another."""
    for found in kit.of(two, "virtual_stages"):
        right, wrong = found["no pipeline"], found["upstream's defaults"]
        assert abs(wrong[1] / right[1] - 1) > 0.1
        # the same float32 sums in the same order but for the norm's
        assert found["one by one"] == pytest.approx(right, rel=1e-6)


def test_virtual_stages_are_refused():
    key = "model.virtual_pipeline_model_parallel_size"
    given = ["pretrained_checkpoint.restore_from_path=.", "model.data.data_prefix.train=[a.jsonl]"]
    config = load_config([*given, "model.pipeline_model_parallel_size=2", f"{key}=2"])
    with pytest.raises(ConfigError, match=f"{key}: not available yet, use null"):
        check(config, world_size=2)


def test_the_writers_undeclared_need_is_declared_here():
    """Without psutil Megatron's writer process dies, and the save waits for it for ever."""
    assert "psutil" not in _needs("megatron-core")
    assert "psutil" in _needs("nemo_kto")


def _needs(distribution: str) -> set[str]:
    requirements = [text for text in metadata.requires(distribution) or [] if "extra ==" not in text]
    return {re.split(r"[^\w.-]", text)[0] for text in requirements}
