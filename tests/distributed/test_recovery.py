"""Damaged checkpoints, saves that fail on one rank, saves beside the training, and the reference that a run keeps."""

from __future__ import annotations

import pytest
import recovery_cases as cases
import tiny
import training_kit as kit
from harness import run_ranks

pytestmark = pytest.mark.distributed


def two_ranks(rank, root):
    todo = ("saved", "damaged", "hopeless", "twice_damaged", "written_beside", "refused", "reference")
    return kit.each({name: getattr(cases, name) for name in todo}, rank, root)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    root = tmp_path_factory.mktemp("recovery")
    tiny.make_model(root / "model", tie_word_embeddings=True, **kit.SIZES)
    tiny.make_model(root / "other", seed=1, tie_word_embeddings=True, **kit.SIZES)
    return run_ranks(2, two_ranks, root, timeout=300)


def test_the_runs_are_there(two):
    assert kit.of(two, "saved") == [True, True]


@pytest.mark.parametrize("kind", cases.DAMAGE)
def test_a_damaged_newest_checkpoint_is_set_aside(kind, two):
    for found in kit.of(two, "damaged"):
        taken, names = found[kind]
        assert taken == "step-000002"
        assert names == ["step-000001", "step-000002", "step-000003.damaged"]


def test_where_none_is_whole_nothing_is_touched(two):
    for found in kit.of(two, "hopeless"):
        kind, text = found["all"]
        assert kind == "CheckpointError"
        assert "no checkpoint in" in text
        assert text.count("has changed since it was written") == 3
        assert found["left"] == ["step-000001", "step-000002", "step-000003"]


def test_no_other_stands_in_for_one_that_was_asked_for(two):
    for found in kit.of(two, "hopeless"):
        kind, text = found["named"]
        assert kind == "CheckpointError"
        assert "exp_manager.resume_from_checkpoint=" in text


def test_the_same_step_may_be_damaged_twice(two):
    for names in kit.of(two, "twice_damaged"):
        assert [name for name in names if "damaged" in name] == ["step-000003.damaged", "step-000003.damaged-2"]


def test_an_asynchronous_save_holds_its_moment(two):
    for found in kit.of(two, "written_beside"):
        assert found["begun"] == (True, False)
        assert found["published"]
        assert found["again"] is None
        assert found["equal"], "other bytes than a save that training waits for"
        assert found["left"] == ["async"]


@pytest.mark.parametrize("when", ["sync", "async"])
@pytest.mark.parametrize("what", ["shard", "index"])
def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_nothing(when, what, two):
    for found in kit.of(two, "refused"):
        kind, text = found[f"{when} {what}"]
        assert kind == "CheckpointError"
        assert f"no-{what}-{when}.partial cannot be written" in text
        assert found[f"{when} then"] == ("", "")
        assert found["left"] == ["fine-async", "fine-sync"]


def test_a_run_keeps_its_reference(two):
    for found in kit.of(two, "reference"):
        identity, right = found["fresh"]
        assert right
        assert found["resumed"] == (identity, True), "taken from the source, which holds other weights"
        assert found["elsewhere"] == (True, True)


def test_a_run_does_not_go_on_with_another_reference(two):
    for found in kit.of(two, "reference"):
        reasons = {"damaged": "has changed since", "lost": "holds no manifest", "another": "another reference"}
        for name, said in reasons.items():
            kind, text = found[name]
            assert kind == "CheckpointError"
            assert said in text
            assert "exp_manager.resume_with_changes=true" in text
        assert found["replaced"] is False, "may_differ takes the source"
