"""A bare KTO run on Megatron for tests of ranks: batches from a formula, no data files, no NeMo, no Lightning.

Megatron is imported inside functions: a test module is imported by pytest too, which needs none of it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

VOCAB = 399
GLOBAL_BATCH, MICRO_BATCH = 8, 2
DECAY = 0.01
SIZES = {"num_hidden_layers": 2}


@dataclass(frozen=True)
class Setup:
    """What a run trains with."""

    tp: int = 1
    pp: int = 1
    optimizer: str = "adamw"
    bf16: bool = False
    dropout: float = 0.0
    overlap: bool = False
    lr: float = 1e-3
    momentum: float = 0.9
    lookahead: int = 1
    restore: str = "auto"


def each(cases: Mapping[str, Callable[[int, Path], Any]], rank: int, root: Path) -> dict[str, Any]:
    """Results of ``cases`` by name; a case that raises leaves its traceback, and the others still run."""
    results: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            results[name] = case(rank, root)
        except Exception:
            results[name] = Failed(traceback.format_exc())
    return results


class Failed(str):
    """The traceback of a case."""


def of(results: list[dict[str, Any]], name: str) -> list[Any]:
    """What every rank returned for a case; fails with the traceback where one raised."""
    found = [result[name] for result in results]
    for rank, value in enumerate(found):
        assert not isinstance(value, Failed), f"rank {rank}:\n{value}"
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two containers of tensors are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _rows(step: int, salt: int):
    """[GLOBAL_BATCH] rows of a step: 3 prompt tokens, 4 to 9 response tokens, from (step, salt) alone."""
    from nemo_kto.data.batch import IGNORE, Rows

    generator = torch.Generator().manual_seed(1000 * step + salt)
    tokens = torch.randint(3, VOCAB, (GLOBAL_BATCH, 12 + step % 3), generator=generator)
    ends = 3 + torch.randint(4, 10, (GLOBAL_BATCH,), generator=generator)
    place = torch.arange(tokens.size(1))
    scored = (place >= 2) & (place < ends[:, None] - 1)
    labels = torch.where(scored, tokens.roll(-1, dims=1), torch.full_like(tokens, IGNORE))
    return Rows(tokens * (place < ends[:, None]), labels)


def batch(step: int, groups, lookahead: int = 1):
    """This rank's share of global batch number ``step``, and of those that come next."""
    from dataclasses import replace

    upcoming = tuple(replace(_share(number, groups), number=number) for number in range(step + 1, step + lookahead))
    return replace(_share(step, groups), number=step, upcoming=upcoming)


def _share(step: int, groups):
    from nemo_kto.data.batch import KTOBatch, Rows, StepBatch
    from nemo_kto.objective.counts import BatchCounts

    samples, pairs = _rows(step, 0), _rows(step, 1)
    desirable = torch.arange(GLOBAL_BATCH) % 3 != step % 3
    share = GLOBAL_BATCH // groups.dp_size
    cuts = [
        slice(i, i + MICRO_BATCH) for i in range(groups.dp_rank * share, (groups.dp_rank + 1) * share, MICRO_BATCH)
    ]
    micro_batches = tuple(
        KTOBatch(
            Rows(samples.tokens[cut], samples.labels[cut]),
            Rows(pairs.tokens[cut], pairs.labels[cut]),
            desirable[cut],
            torch.ones(MICRO_BATCH, dtype=torch.bool),
            torch.arange(GLOBAL_BATCH)[cut],
        )
        for cut in cuts
    )
    num_desirable = int(desirable.sum())
    counts = BatchCounts(GLOBAL_BATCH, num_desirable, GLOBAL_BATCH - num_desirable, GLOBAL_BATCH, 0)
    return StepBatch(micro_batches, counts).to(groups.device)


class Run:
    """Policy, reference, optimizer and steps, wired as the product wires them (training/kto_model.py).

    Args:
        setup: layout, optimizer, precision.
        policy: Hugging Face directory where the policy starts.
        reference: the reference's; None: the policy's.
    """

    def __init__(self, setup: Setup, policy: Path, reference: Path | None = None) -> None:
        from nemo_kto import cpu_backend, launch

        cpu_backend.install()  # before anything imports Megatron
        from nemo_kto.checkpoint.weights import load_weights
        from nemo_kto.config.architecture import read_architecture
        from nemo_kto.gpt.build import PlainNetwork, build_gpt
        from nemo_kto.gpt.forward import Passes
        from nemo_kto.reference.columns import ReferenceColumns
        from nemo_kto.reference.host_weights import HostWeights
        from nemo_kto.reference.swap import SwapReference, WeightSwap
        from nemo_kto.training.optim import (
            LightningMegatronOptimizer,
            build_optimizer,
            float32_masters,
            wrap_data_parallel,
        )
        from nemo_kto.training.step import KTOStep

        self.setup, self.hf_dir, self.steps_done = setup, policy, 0
        self.reference_bytes: list[int] = []
        self.arch = read_architecture(policy)
        self.groups = groups = launch.start(setup.tp, setup.pp, seed=7)
        arch, optim = self.arch, _optim(setup)
        network = PlainNetwork(hidden_dropout=setup.dropout, attention_dropout=setup.dropout)
        self.chunks = wrap_data_parallel(build_gpt(arch, network, bf16=setup.bf16, groups=groups), optim)
        load_weights(self.chunks, arch, reference or policy, groups)
        self.swap = WeightSwap(self.chunks, HostWeights(self.chunks), setup.restore)
        if reference is not None:
            load_weights(self.chunks, arch, policy, groups)
        self.passes = Passes(self.chunks, groups, arch.vocab_size)
        scorer = SwapReference(self.swap, self.passes)
        self.reference = ReferenceColumns(scorer, micro_batch_size=MICRO_BATCH, needs_kl=True)
        self.step = KTOStep(self.passes, self.reference, _settings(), groups, MICRO_BATCH)
        megatron = build_optimizer(self.chunks, optim, clip_grad=1.0)
        self.swap.use_masters(partial(float32_masters, megatron))
        self.optimizer = LightningMegatronOptimizer(megatron, self.chunks)

    def train(self, steps: int) -> list[dict[str, float]]:
        """So many optimizer steps; their sums and gradient norms. ``reference_bytes`` gets what each has moved."""
        from nemo_kto.training.optim import set_learning_rate

        records = []
        for done in range(steps):
            set_learning_rate(self.optimizer.megatron, self.setup.lr, DECAY)
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            ahead = 1 if done % self.setup.lookahead else min(self.setup.lookahead, steps - done)
            moved = self.swap.bytes_moved
            sums = self.step.train(batch(self.steps_done, self.groups, ahead))
            self.reference_bytes.append(self.swap.bytes_moved - moved)
            self.optimizer.step()
            self.steps_done += 1
            records.append({**sums, "grad_norm": self.optimizer.grad_norm})
        return records

    def save(self, out: Path, *, optimizer: bool = True) -> None:
        """A checkpoint of weights and optimizer, or of the weights alone."""
        from nemo_kto.checkpoint.saving import CheckpointWriter

        CheckpointWriter().save(self.chunks, self.contents(optimizer=optimizer), out, self.groups)

    def contents(self, *, optimizer: bool = True):
        """What goes along into a checkpoint, as the product puts it there (training/strategy.py)."""
        from nemo_kto.checkpoint.saving import Contents

        megatron = self.optimizer.megatron if optimizer else None
        return Contents(self.hf_dir, megatron, {"steps": self.steps_done}, random_streams=optimizer)

    def load(self, checkpoint: Path) -> Run:
        """Go on from a checkpoint, as the product does (training/strategy.py)."""
        from nemo_kto.checkpoint import dist, random_state
        from nemo_kto.training.optim import prime_state

        prime_state(self.optimizer.megatron)
        common = dist.load(self.chunks, self.optimizer.megatron, checkpoint, self.groups)
        streams = random_state.read(checkpoint, self.groups)
        if streams is not None:
            random_state.restore(streams)
        self.steps_done = common["steps"]
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of this rank's live parameters."""
        return {name: p.detach().clone() for chunk in self.chunks for name, p in chunk.named_parameters()}

    def optimizer_state(self) -> list[Any]:
        """A copy of masters and moments, in the optimizer's order."""
        parts = getattr(self.optimizer.megatron, "chained_optimizers", [self.optimizer.megatron])
        inner = [part.optimizer for part in parts]
        return [
            [p.detach().clone(), {k: v.clone() for k, v in adam.state[p].items() if isinstance(v, torch.Tensor)}]
            for adam in inner
            for group in adam.param_groups
            for p in group["params"]
        ]


def _optim(setup: Setup):
    from nemo_kto.config.schema import OptimConfig, ScheduleConfig

    return OptimConfig(
        name=setup.optimizer,
        lr=setup.lr,
        weight_decay=DECAY,
        betas=[0.9, 0.95],
        eps=1e-8,
        momentum=setup.momentum,
        overlap_grad_sync=setup.overlap,
        overlap_param_sync=setup.overlap,
        sched=ScheduleConfig("Constant", 0, 0, 0.0),
    )


def _settings():
    from nemo_kto.objective.losses import LossSettings

    return LossSettings(
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        kl_clamp="per_sample",
        loss_normalization="per_class",
        loss_type="kto",
        preference_weight=1.0,
        sft_weight=0.0,
        average_log_probs=False,
        sft_average_log_probs=False,
    )
