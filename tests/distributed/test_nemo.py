"""``.nemo`` archives at every layout: bit for bit there and back, NeMo 1.x's too; and hostile ones run nothing."""

from __future__ import annotations

from pathlib import Path

import nemo_cases as cases
import pytest
import tiny
import torch
import training_kit as kit
from harness import run_ranks
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed


def one_rank(rank, root):
    todo = {"written": cases.write_nemo1, "end": cases.relay_end, "hostile": cases.hostile, "proof": cases.proof}
    return kit.each(todo, rank, root)


def two_ranks(rank, root):
    return kit.each({"relay": cases.relay, "failed save": cases.failed_save}, rank, root)


def two_readers(rank, root):
    return kit.each({"read": cases.read_nemo1}, rank, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("nemo")
    tiny.make_model(root / "tied", tie_word_embeddings=True, **kit.SIZES)
    tiny.make_model(root / "untied", **kit.SIZES)
    tiny.make_model(root / "qwen2", "qwen2", **kit.SIZES)
    return root


@pytest.fixture(scope="module")
def two(root):
    return run_ranks(2, two_ranks, root, timeout=240)


@pytest.fixture(scope="module")
def one(root, two):
    return run_ranks(1, one_rank, root, timeout=240)


@pytest.fixture(scope="module")
def readers(root, one):
    return run_ranks(2, two_readers, root, timeout=240)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("model", cases.MODELS)
def test_weights_come_back_bit_for_bit_through_three_layouts(model, root, two, one):
    """TP 2 trains and saves, PP 2 reads and saves, one rank reads."""
    kit.of(two, "relay")
    kit.of(one, "end")
    trained, end = weights(root / f"{model}-tp2"), weights(root / f"{model}-end")
    assert kit.same(trained, end)
    original = weights(root / model)
    assert trained.keys() == original.keys()
    assert not kit.same(trained, original), "nothing was trained"


@pytest.mark.parametrize("layout", ["tp", "pp"])
@pytest.mark.parametrize("model", ["tied", "untied", "qwen2"])
def test_a_distributed_archive_of_nemo_1_is_read_at_any_layout(model, layout, root, one, readers):
    kit.of(one, "written")
    kit.of(readers, "read")
    assert kit.same(weights(root / f"{model}-nemo1-{layout}"), weights(root / model))


def test_a_save_that_fails_leaves_the_old_archive_alone(two):
    for found in kit.of(two, "failed save"):
        assert "CheckpointError" in found["message"]
        assert "full.nemo cannot be written" in found["message"]
        assert "No space left" in found["message"]
        assert found["kept"]
        assert found["left"] == ["full.nemo"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("index", "evil-index.nemo/model_weights/.metadata asks for"),
        ("common state", "CheckpointError"),
        ("extra state", "loaded"),
        ("object", "evil-object.nemo/model_weights/.metadata holds a pickled object where the tensor"),
        ("zarr", "is in the format 'zarr'; only torch_dist is read"),
        ("bias", "linear_qkv.bias is unexpected"),
    ],
)
def test_a_hostile_archive_runs_nothing(name, message, one):
    assert kit.of(one, "proof") == [True]
    said, ran = kit.of(one, "hostile")[0][name]
    assert message in said
    assert not ran
