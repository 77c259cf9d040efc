"""The reference by weight swap: every rule of design section 1, on real Megatron wrappers and optimizers."""

from __future__ import annotations

import pytest
import tiny
import training_kit as kit
from harness import run_ranks
from swap_cases import ONE, TWO, one_rank, two_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Policy and reference, untied, and tied for pipelines."""
    root = tmp_path_factory.mktemp("swap")
    for number, name in enumerate(("policy", "reference")):
        tiny.make_model(root / f"plain-{name}", seed=number, **kit.SIZES)
        tiny.make_model(root / f"tied-{name}", seed=number, tie_word_embeddings=True, **kit.SIZES)
    return root


@pytest.fixture(scope="module")
def one(root):
    return run_ranks(1, one_rank, root, timeout=240)


@pytest.fixture(scope="module")
def two(root):
    return run_ranks(2, two_ranks, root, timeout=240)


@pytest.fixture
def results(request, name):
    """The ranks that ran a case."""
    return kit.of(request.getfixturevalue("one" if name in ONE else "two"), name)


@pytest.mark.parametrize("name", [*ONE, *TWO])
class TestRestored:
    def test_the_model_is_the_reference_inside(self, name, results):
        assert all(found["inside is reference"] and found["policy differs"] for found in results)

    def test_the_policy_comes_back_bit_for_bit(self, name, results):
        assert all(found["back"] and found["optimizer untouched"] for found in results)

    def test_the_policy_comes_back_when_scoring_raises(self, name, results):
        assert all(found["back after an error"] and found["optimizer untouched by it"] for found in results)

    def test_nothing_is_rebound(self, name, results):
        assert all(found["in place"] for found in results)

    def test_the_policy_waits_where_it_is_told_to(self, name, results):
        assert all(found["kept as told"] for found in results)


@pytest.mark.parametrize("name", ["pp2 tied", "pp2 tied bf16"])
def test_both_copies_of_a_tied_embedding_are_swapped(name, two):
    first, last = kit.of(two, name)
    assert (first["vocabulary"], last["vocabulary"]) == (["word_embeddings"], ["output_layer"])
    assert first["inside is reference"]
    assert last["inside is reference"]


def test_scoring_needs_no_gradient_and_no_training_mode(one):
    (found,) = kit.of(one, "modes")
    assert found["passes"] == 8  # 4 micro-batches of samples, 4 of pairs
    assert all(found.values()), found


@pytest.mark.parametrize("name", ["random", "random tp2"])
def test_scoring_draws_nothing_from_the_random_streams(name, one, two):
    for found in kit.of(one if name == "random" else two, name):
        assert all(found.values()), found


@pytest.mark.parametrize("name", ["overlap fp32", "overlap bf16"])
def test_pending_parameter_gathers_are_finished_first(name, two):
    for found in kit.of(two, name):
        assert found["hooks"] == {"before": True, "during": [0], "restored": True}
        assert found["trajectory"], "training differs from training without overlap"
        assert found["weights"], "the last swap left other weights"
        assert found["captured"], "a stale policy was saved"


def test_what_would_act_on_the_wrong_policy_is_refused(one):
    (messages,) = kit.of(one, "refusals")
    named = ("an optimizer step", "saving a checkpoint", "exporting", "another swap")
    for action, message in zip(named, messages, strict=True):
        assert message.startswith(f"{action} while the reference weights are swapped in")


@pytest.mark.parametrize("name", ["drift fp32", "drift bf16 sharded", "drift pp2"])
def test_the_reference_never_drifts(name, one, two):
    for found in kit.of(two if name == "drift pp2" else one, name):
        assert found["digest"]
        assert found["scores"]
        # 20 steps at rate 1e-3 move weights of 0.1 by up to 0.02 each: log-probs of 4 to 9 tokens move by nats
        assert found["policy moved"] > 1e-3
