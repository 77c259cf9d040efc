"""Every layout that the program would accept for a run, and what each of them needs. Chooses none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nemo_kto.config.architecture import Architecture
from nemo_kto.config.layout import check_layout
from nemo_kto.errors import ConfigError
from nemo_kto.planning.duration import StepTime, step_time
from nemo_kto.planning.memory import RankMemory, rank_memory, stages_that_differ
from nemo_kto.planning.request import Job, Layout, Machine

MICRO_BATCH_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Candidate:
    """A layout and what is predicted of it.

    Attributes:
        layout: the layout.
        stages: memory of a rank of the first, the second and the last pipeline stage, as far as they differ.
        micro_batches: per data-parallel rank and step.
        time: of a step.
        fits: whether the fullest rank fits into what may be planned with.
    """

    layout: Layout
    stages: tuple[RankMemory, ...]
    micro_batches: int
    time: StepTime
    fits: bool

    @property
    def fullest(self) -> RankMemory:
        """The rank that needs most."""
        return max(self.stages, key=lambda rank: rank.total)

    def to_json(self) -> dict[str, Any]:
        """All of it; ``fullest`` is the number of that stage."""
        return {
            **self.layout.__dict__,
            "micro_batches": self.micro_batches,
            "fits": self.fits,
            "fullest_stage": self.fullest.stage,
            "stages": [rank.to_json() for rank in self.stages],
            "step_seconds": self.time.to_json(),
        }


def candidates(job: Job, machine: Machine) -> list[Candidate]:
    """All layouts, those that do not fit among them, each with its predictions.

    Layers are recomputed where a layout does not fit without: of ``block`` the fewest layers with which it does, and
    of ``uniform`` every unit.
    """
    return [found for layout in plain_layouts(job) for found in _with_recompute(job, layout, machine)]


def data_parallel_sizes(job: Job) -> list[int]:
    """Data-parallel sizes that the network's TP and PP leave, whatever the batch size."""
    return sorted({job.world // (tp * pp) for tp, pp in _model_parallel_sizes(job)})


def plain_layouts(job: Job) -> Iterator[Layout]:
    """Layouts without recomputation. Virtual pipelines and context parallelism are refused by the config."""
    for tp, pp in _model_parallel_sizes(job):
        dp = job.world // (tp * pp)
        for micro in MICRO_BATCH_SIZES:
            if job.global_batch_size % (micro * dp) == 0:
                yield Layout(tp, pp, dp, False, micro)
                if tp > 1 and job.seq_length % tp == 0:
                    yield Layout(tp, pp, dp, True, micro)


def _model_parallel_sizes(job: Job) -> Iterator[tuple[int, int]]:
    """(TP, PP) that divide network and world. A tensor-parallel group never leaves its node, for lack of speed."""
    node = min(job.gpus_per_node, job.world)
    depths = [pp for pp in range(1, job.arch.num_layers + 1) if _divides(job.arch, 1, pp)]
    for tp in (n for n in range(1, node + 1) if node % n == 0 and _divides(job.arch, n, 1)):
        yield from ((tp, pp) for pp in depths if job.world // tp % pp == 0)


def _divides(arch: Architecture, tp: int, pp: int) -> bool:
    try:
        check_layout(arch, tensor_parallel=tp, pipeline_parallel=pp)
    except ConfigError:
        return False
    return True


def _with_recompute(job: Job, layout: Layout, machine: Machine) -> Iterator[Candidate]:
    plain = predict(job, layout, machine)
    yield plain
    if plain.fits:
        return
    layers = job.arch.num_layers // layout.pp
    units = [n for n in range(1, layers + 1) if layers % n == 0]
    for unit in units:
        yield predict(job, replace(layout, recompute="uniform", recompute_layers=unit), machine)
    low, high = 1, layers  # memory falls with every recomputed layer
    while low < high:
        middle = (low + high) // 2
        found = predict(job, replace(layout, recompute="block", recompute_layers=middle), machine)
        low, high = (low, middle) if found.fits else (middle + 1, high)
    yield predict(job, replace(layout, recompute="block", recompute_layers=low), machine)


def predict(job: Job, layout: Layout, machine: Machine) -> Candidate:
    """Memory of the stages that differ, and time, of one layout."""
    stages = tuple(rank_memory(job, layout, machine, stage) for stage in stages_that_differ(layout))
    fullest = max(stages, key=lambda rank: rank.total)
    time = step_time(job, layout, machine, fullest)
    return Candidate(layout, stages, layout.micro_batches(job), time, fullest.total <= machine.usable)
