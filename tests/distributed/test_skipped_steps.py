"""A step whose gradient or loss is not finite leaves no trace on any rank; any other step is Megatron's own."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import training_kit as kit
from harness import run_ranks
from training_kit import DECAY, Run, Setup, batch

pytestmark = pytest.mark.distributed

SHARDED = "distributed_fused_adam"
ONE = {"fp32": Setup(), "bf16": Setup(bf16=True), "sgd": Setup(optimizer="sgd", lr=0.1)}
TWO = {
    "dp2": Setup(),
    "dp2 sharded": Setup(optimizer=SHARDED),
    "dp2 sharded bf16": Setup(optimizer=SHARDED, bf16=True),
    "dp2 overlapped": Setup(optimizer=SHARDED, overlap=True),
    "tp2": Setup(tp=2),
    "pp2": Setup(pp=2),
    "pp2 sharded": Setup(pp=2, optimizer=SHARDED),
}
SLOW = {"dp2 sharded bf16", "dp2 overlapped", "tp2", "pp2"}
"""Left to the slow tests: what differs is Megatron's, and the others have it in part."""
ALL_PARAMETERS = ""
SPOILED = {"nan": (ALL_PARAMETERS, math.nan), "inf": (ALL_PARAMETERS, math.inf), "overflow": (ALL_PARAMETERS, 1e25)}
"""What the last rank finds in its reduced gradient. The square of 1e25 is beyond float32, and with it the norm."""
COPIES = {"tp2": "input_layernorm.weight", "pp2": "output_layer.weight", "pp2 sharded": "output_layer.weight"}
"""A parameter of which both ranks have a copy, and only the first counts its own in the norm."""


def _spoil(run, name, value):
    """Put a value into gradients on the last rank only."""
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        found = [p for chunk in run.chunks for n, p in chunk.named_parameters() if n.endswith(name)]
        assert found
        for parameter in found:
            parameter.main_grad.fill_(value)


def _step(run, spoiled=None, *, megatron=False, bad_loss=False):
    """One step as the product makes it; its sums, gradient norm, and whether it was taken."""
    from nemo_kto.training.optim import set_learning_rate

    set_learning_rate(run.optimizer.megatron, run.setup.lr, DECAY)
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    sums = run.step.train(batch(run.steps_done, run.groups))
    if spoiled is not None:
        _spoil(run, *spoiled)
    run.steps_done += 1
    if megatron:
        taken, norm, _ = run.optimizer.megatron.step()
        return sums, norm, taken
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    run.optimizer.step(loss_is_finite=not (bad_loss and last))
    return sums, run.optimizer.grad_norm, run.optimizer.succeeded


def _gradients_left(run):
    """Anything in gradient buffers, and gradients that the optimizer still holds."""
    buffers = [buffer.grad_data for chunk in run.chunks for buffer in chunk.buffers]
    held = [p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
    return any(bool((data != 0).any()) for data in buffers) or bool(held)


def skipped(root, setup, spoiled=None, *, bad_loss=False):
    """Steps 0 to 3 with step 1 spoiled, against a run that never sees batch 1."""
    run = Run(setup, root / "tied")  # puts the shims in place that the next import needs
    from nemo_kto.gpt.live import parameters_settled

    _step(run)
    with parameters_settled(run.chunks):
        weights, state = run.weights(), run.optimizer_state()
    *_, taken = _step(run, spoiled, bad_loss=bad_loss)
    found = {
        "taken": taken,
        "weights": kit.same(run.weights(), weights),
        "state": kit.same(run.optimizer_state(), state),
        "gradients left": _gradients_left(run),
    }
    other = Run(setup, root / "tied")
    _step(other)
    other.steps_done += 1
    later = [(_step(run), _step(other)) for _ in range(2)]
    return {
        **found,
        "later": [one == two and one[2] for one, two in later],
        "later weights": kit.same(run.weights(), other.weights()) and not kit.same(run.weights(), weights),
        "later state": kit.same(run.optimizer_state(), other.optimizer_state()),
    }


def as_megatron(root, setup, clip):
    """Three steps of ours and three of Megatron's, where the norm is clipped and where it is not."""
    runs = [Run(setup, root / "tied") for _ in range(2)]
    for run in runs:
        for part in run.optimizer.megatron.chained_optimizers:
            part.config.clip_grad = clip
    steps = [[_step(run, megatron=run is runs[1]) for _ in range(3)] for run in runs]
    ours, theirs = runs
    return {
        "steps": steps[0] == steps[1],
        "norms": [norm for _, norm, _ in steps[0]],
        "weights": kit.same(ours.weights(), theirs.weights()),
        "state": kit.same(ours.optimizer_state(), theirs.optimizer_state()),
    }


def _cases(setups):
    cases = {}
    for layout, setup in setups.items():
        for kind, spoiled in SPOILED.items():
            cases[f"{layout} {kind}"] = lambda _, root, setup=setup, spoiled=spoiled: skipped(root, setup, spoiled)
        cases[f"{layout} loss"] = lambda _, root, setup=setup: skipped(root, setup, bad_loss=True)
        if layout in COPIES:
            spoiled = (COPIES[layout], math.nan)
            cases[f"{layout} copy"] = lambda _, root, setup=setup, spoiled=spoiled: skipped(root, setup, spoiled)
        for name, clip in CLIPS.items():
            cases[f"{layout} {name}"] = lambda _, root, setup=setup, clip=clip: as_megatron(root, setup, clip)
    return cases


CLIPS = {"clipped": 0.01, "unclipped": math.inf}
ALL = [*ONE, *TWO]


def marks(layout):
    return pytest.mark.slow if layout in SLOW else ()


def one_rank(rank, root):
    return kit.each(_cases(ONE), rank, root)


def two_ranks(rank, root, layouts):
    return kit.each(_cases({layout: TWO[layout] for layout in layouts}), rank, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("skipped")
    tiny.make_model(root / "tied", tie_word_embeddings=True, **kit.SIZES)
    return root


@pytest.fixture(scope="module")
def one(root):
    return run_ranks(1, one_rank, root, timeout=240)


@pytest.fixture(scope="module")
def two(root, wanted):
    return run_ranks(2, two_ranks, root, [layout for layout in TWO if layout in wanted("layout")], timeout=400)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        *(pytest.param(layout, kind, marks=marks(layout)) for layout in ALL for kind in (*SPOILED, "loss")),
        *(pytest.param(layout, "copy", marks=marks(layout)) for layout in COPIES),
    ],
)
def test_what_is_bad_on_one_rank_moves_nothing_on_any(layout, kind, request):
    for found in kit.of(request.getfixturevalue("one" if layout in ONE else "two"), f"{layout} {kind}"):
        assert found == {
            "taken": False,
            "weights": True,
            "state": True,
            "gradients left": False,
            "later": [True, True],
            "later weights": True,
            "later state": True,
        }


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("layout", [pytest.param(layout, marks=marks(layout)) for layout in ALL])
def test_a_good_step_is_megatrons_bit_for_bit(layout, clip, request):
    for found in kit.of(request.getfixturevalue("one" if layout in ONE else "two"), f"{layout} {clip}"):
        assert found["steps"]
        assert found["weights"]
        assert found["state"]
        assert all(norm > CLIPS["clipped"] for norm in found["norms"]), "nothing would be clipped"
