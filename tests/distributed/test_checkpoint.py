"""Megatron checkpoints: the same layout goes on bit for bit, others within rounding, and errors stop all ranks."""

from __future__ import annotations

import checkpoint_cases as cases
import pytest
import tiny
import training_kit as kit
from harness import RankError, run_ranks

from nemo_kto.config.locate import is_megatron_checkpoint

pytestmark = pytest.mark.distributed

LOSS, NORM = 1e-5, 1e-4
"""Relative, of loss and gradient norm (design section 5). Layouts add the same float32 numbers in other orders: 1e-7
per sum, and Adam, which divides by the root of a second moment that may be small, carries it from step to step."""


def one_rank(rank, root):
    todo = {
        name: (lambda _, r, name=name, setup=setup: cases.resumed(r, name, setup))
        for name, setup in cases.SAME_LAYOUT.items()
    }
    return kit.each({**todo, "torch adam": cases.torch_adam}, rank, root)


def two_ranks(rank, root):
    todo = {
        name: (lambda _, r, name=name, setup=setup: cases.resumed(r, name, setup))
        for name, setup in cases.SAME_LAYOUT_TWO.items()
    }
    more = {
        "resharding": cases.resharding,
        "weights only": cases.weights_only,
        "loading errors": cases.loading_errors,
        "saving errors": cases.saving_errors,
    }
    return kit.each({**todo, **more}, rank, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    tiny.make_model(root / "tied", tie_word_embeddings=True, **kit.SIZES)
    tiny.make_model(root / "untied", **kit.SIZES)
    tiny.make_model(root / "other", seed=1, tie_word_embeddings=True, **kit.SIZES)
    tiny.make_model(root / "deeper", tie_word_embeddings=True, num_hidden_layers=4)
    tiny.make_model(root / "wider", tie_word_embeddings=True, intermediate_size=192, **kit.SIZES)
    tiny.make_model(root / "qwen2", "qwen2", tie_word_embeddings=True, **kit.SIZES)
    return root


@pytest.fixture(scope="module")
def one(root):
    return run_ranks(1, one_rank, root, timeout=240)


@pytest.fixture(scope="module")
def two(root):
    return run_ranks(2, two_ranks, root, timeout=300)


@pytest.fixture(scope="module")
def end(root, two):
    return run_ranks(1, cases.relay_end, root)[0]


@pytest.mark.parametrize("name", [*cases.SAME_LAYOUT, *cases.SAME_LAYOUT_TWO])
def test_resuming_at_the_same_layout_equals_no_interruption(name, request):
    for found in kit.of(request.getfixturevalue("one" if name in cases.SAME_LAYOUT else "two"), name):
        assert found["weights loaded"]
        assert found["optimizer loaded"]
        assert found["steps"] == 2
        resumed, uninterrupted = found["records"]
        assert resumed == uninterrupted
        assert found["weights"]
        assert found["optimizer"]


@pytest.mark.parametrize("name", ["bf16", "bf16 sharded", "dp2 bf16 sharded"])
def test_masters_are_saved_not_made_from_rounded_weights(name, request):
    for found in kit.of(request.getfixturevalue("one" if name in cases.SAME_LAYOUT else "two"), name):
        assert not any(found["rounded masters"])


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_resharding_goes_on_within_rounding(model, two, end):
    relay = kit.of(two, "resharding")
    assert relay[0] == relay[1], "the ranks disagree"
    last, uninterrupted = end[model]
    for found, expected in zip([*relay[0][model], *last], uninterrupted, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=LOSS)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=NORM)


@pytest.mark.parametrize("name", ["fp32", "fp32 sharded", "bf16 sharded"])
def test_torch_adam_survives_a_load(name, one):
    (found,) = kit.of(one, "torch adam")
    case = found[name]
    assert case["weights kept"], "priming moved the weights"
    assert case["rates kept"], "priming left its rate or decay"
    assert case["moments"] == {0.0}, "priming left moments"
    assert case["shared"] == 0, "parameters share a step, which Adam advances once for each of them"
    assert case["loaded"] == {2.0}
    assert case["after one more"] == {3.0}


def test_weights_alone(two):
    for found in kit.of(two, "weights only"):
        assert found["alone"]
        assert found["whole"]
        assert found["through a pipeline"]
        assert "alone" in found["no optimizer"]


@pytest.mark.parametrize("name", [*cases.BROKEN, "deeper", "wider", "qwen2", "other optimizer"])
def test_what_cannot_be_loaded_is_named_on_all_ranks(name, two):
    for found in kit.of(two, "loading errors"):
        kind, message = found[name]
        assert kind == "CheckpointError", message
        assert (f"broken-{name}" if name in cases.BROKEN else "whole") in message
        assert len(message) < 600


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("exists", "whole"),
        ("under a file", "a-file"),
        ("full disk", "too-large"),
        ("no config", "nowhere/config.json"),
    ],
)
def test_what_cannot_be_saved_is_named_on_all_ranks(name, path, two):
    for found in kit.of(two, "saving errors"):
        kind, message = found[name]
        assert kind == "CheckpointError", message
        assert path in message


@pytest.mark.slow
def test_a_killed_save_leaves_no_checkpoint_and_no_obstacle(root):
    for moment in cases.MOMENTS:
        with pytest.raises(RankError, match=r"exit codes by rank: \[-9\]"):
            run_ranks(1, cases.killed_save, root, moment)
        folder = root / "killed" / moment
        assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002.partial"]
        assert is_megatron_checkpoint(folder / "step-000001")
    assert run_ranks(1, cases.saved_again, root) == [[2, 2]]
    for moment in cases.MOMENTS:
        names = sorted(path.name for path in (root / "killed" / moment).iterdir())
        assert names == ["step-000001", "step-000002"]
