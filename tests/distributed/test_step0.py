"""Before training, policy and reference are one model, and everything that compares them is exactly nothing.

Exactly, because scoring and training see equal rows, padding and micro-batches: log-ratios are 0 and not small, in
float32 and in bfloat16, in every layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from trajectory import ADAM, GRADIENT, Job, make_files

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NORMALIZATIONS = ("per_batch", "per_class")
RECIPE = replace(ADAM, start="reference")
AHEAD = "model.kto.reference_lookahead=2"
"""The second batch's columns are looked at as they were scored with the first; the step scores them again, alone."""
LAYOUTS = {
    "tp1": (1, ()),
    "tp2": (2, ("model.tensor_model_parallel_size=2",)),
    "tp2sp": (2, ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")),
    "pp2": (2, ("model.pipeline_model_parallel_size=2",)),
    "dp2": (2, ()),
}
PRECISIONS = {"32": GRADIENT, "bf16": 0.1}
"""And how far gradients may be from the oracle's: in bfloat16 weights, activations and their gradients keep 8 bits,
2^-9 each time, through four layers and back, and k_proj's gradient is a small difference: 3e-2 was seen."""
OPTIMIZERS = ("adamw", "distributed_fused_adam")


@dataclass
class Seen:
    """One global batch at step 0, on one rank."""

    num_desirable: int
    num_undesirable: int
    log_ratios: list[torch.Tensor]
    kl_log_ratios: list[torch.Tensor]
    sums: dict[str, dict[str, float]]
    gradients: dict[str, torch.Tensor]


def observe(job: Job, batch) -> Seen:
    """h and k of each row, and what the step makes of them."""
    scored = job.step.reference.score(batch)
    log_ratios: list[torch.Tensor] = []

    def objective(policy_logps, micro_batch):
        log_ratios.append((policy_logps - micro_batch.ref_logps).detach())
        return policy_logps.sum(), {}

    job.step.passes.train(scored.micro_batches, objective)
    kl_logps = job.step.passes.score([b.kl_rows for b in scored], job.step.score_micro_batch_size)
    kl_log_ratios = [k - b.ref_kl_logps for k, b in zip(kl_logps, scored, strict=bool(kl_logps))]
    sums = {}
    for normalization in NORMALIZATIONS:
        job.clear_gradients()
        step = replace(job.step, settings=replace(job.settings, loss_normalization=normalization))
        sums[normalization] = step.train(batch)
    split = job.config.model.optim.is_distributed and job.groups.dp_size > 1
    gradients = {} if split else job.whole(lambda parameter: parameter.main_grad)
    return Seen(batch.counts.num_desirable, batch.counts.num_undesirable, log_ratios, kl_log_ratios, sums, gradients)


def run_world(rank: int, world: int, root: Path) -> dict[tuple[str, str, str], list[Seen]]:
    found = {}
    for layout, (size, words) in LAYOUTS.items():
        for precision in PRECISIONS if size == world else ():
            for optimizer in OPTIMIZERS:
                settings = [f"trainer.precision={precision}", f"model.optim.name={optimizer}", *words]
                job = Job([*RECIPE.overrides(root), AHEAD, "model.micro_batch_size=2", *settings])
                batches = iter(job.batches)
                found[layout, precision, optimizer] = [observe(job, next(batches)) for _ in range(2)]
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("step0"))


@pytest.fixture(scope="module")
def worlds(root: Path) -> dict[int, list[dict]]:
    return {world: run_ranks(world, run_world, world, root, timeout=300) for world in (1, 2)}


every_case = pytest.mark.parametrize(
    "case",
    [(layout, precision, optimizer) for layout in LAYOUTS for precision in PRECISIONS for optimizer in OPTIMIZERS],
    ids="-".join,
)


@every_case
def test_nothing_differs_from_itself(case, worlds) -> None:
    scored = 0
    for rank in worlds[LAYOUTS[case[0]][0]]:
        for seen in rank[case]:
            for ratios in (*seen.log_ratios, *seen.kl_log_ratios):
                assert ratios.dtype == torch.float64
                assert torch.count_nonzero(ratios) == 0
                scored += ratios.numel()
    # two batches of 8 samples and 8 pairs, seen by each TP rank of the last stage
    assert scored == 2 * 16 * (2 if case[0].startswith("tp2") else 1)


@every_case
def test_the_loss_is_half_the_weights(case, worlds) -> None:
    """Weights and counts are such that no rounding enters: 1.5 / 3, 1.25 / 5, quarters and eighths of both."""
    w_des, w_und = RECIPE.desirable_weight, RECIPE.undesirable_weight
    for rank in worlds[LAYOUTS[case[0]][0]]:
        assert [(seen.num_desirable, seen.num_undesirable) for seen in rank[case]] == [(3, 5), (4, 4)]
        for seen in rank[case]:
            good, bad = seen.num_desirable, seen.num_undesirable
            assert seen.sums["per_class"]["loss"] == (w_des + w_und) / 2
            assert seen.sums["per_batch"]["loss"] == (w_des * good + w_und * bad) / (2 * (good + bad))
            for sums in seen.sums.values():
                assert sums["kl_ref"] == sums["rewards_desirable"] == sums["rewards_undesirable"] == 0.0
                assert sums["correct"] == bad  # a reward of 0 is not above a reference point of 0


@every_case
def test_gradients_are_the_oracles(case, worlds, oracle_gradients) -> None:
    layout, precision, _ = case
    whole: dict[str, torch.Tensor] = {}
    for rank in worlds[LAYOUTS[layout][0]]:
        whole |= rank[case][0].gradients
    if not whole:
        pytest.skip("each rank holds a part of the summed gradients")
    assert whole.keys() == oracle_gradients.keys()
    for name, gradient in oracle_gradients.items():
        off = (whole[name].double() - gradient).norm() / gradient.norm()
        assert off <= PRECISIONS[precision], name


@pytest.fixture(scope="module")
def oracle_gradients(root: Path) -> dict[str, torch.Tensor]:
    return RECIPE.oracle_gradients(root)
