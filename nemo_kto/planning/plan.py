"""Chooses a layout, and says what to set for it, or why there is none."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from nemo_kto.errors import ConfigError
from nemo_kto.planning.duration import step_flops
from nemo_kto.planning.layouts import Candidate, candidates, data_parallel_sizes
from nemo_kto.planning.request import GB, Job, Layout, Machine

_TIE = 0.05
"""Layouts whose times differ by less are taken for equally quick: the assumed speeds tell no finer difference."""
_MOST = 64
"""Times the GPUs asked for: how far a refusal looks for a number that would do."""


@dataclass(frozen=True)
class Plan:
    """What was found for a run.

    Attributes:
        job: the run.
        machine: what it is for.
        fitting: layouts that fit, the quickest first; of those within 5 % the one that needs the least memory.
        evaluated: number of layouts that were looked at.
    """

    job: Job
    machine: Machine
    fitting: tuple[Candidate, ...]
    evaluated: int

    @property
    def best(self) -> Candidate:
        """The layout to take."""
        return self.fitting[0]

    @property
    def quickest(self) -> float:
        """Seconds of the quickest step."""
        return min(found.time.total for found in self.fitting)

    def to_json(self, top: int) -> dict[str, Any]:
        """Everything, with the first ``top`` layouts. Sizes in bytes, times in seconds."""
        return {
            "job": asdict(self.job),
            "machine": asdict(self.machine),
            "usable_bytes": self.machine.usable,
            "step_flops": step_flops(self.job),
            "evaluated": self.evaluated,
            "fitting": len(self.fitting),
            "overrides": overrides(self.job, self.best.layout),
            "layouts": [
                {**found.to_json(), "relative_time": found.time.total / self.quickest} for found in self.fitting[:top]
            ],
        }


def make_plan(job: Job, machine: Machine) -> Plan:
    """Look at every layout and rank those that fit.

    Raises:
        ConfigError: none fits; tells the least that any needs, and what would do.
    """
    job.check()
    found = candidates(job, machine)
    if not found:
        raise ConfigError(_no_layout(job))
    fitting = _ranked(found)
    if not fitting:
        raise ConfigError(_no_room(job, machine, found))
    return Plan(job, machine, tuple(fitting), len(found))


def overrides(job: Job, layout: Layout) -> list[str]:
    """Settings of ``conf/gpt_kto.yaml`` that make a run have this layout."""
    again = layout.recompute is not None
    lora = job.lora_dim is not None
    values: dict[str, object] = {
        "trainer.precision": "bf16" if job.bf16 else 32,
        "model.tensor_model_parallel_size": layout.tp,
        "model.pipeline_model_parallel_size": layout.pp,
        "model.sequence_parallel": str(layout.sequence_parallel).lower(),
        "model.micro_batch_size": layout.micro_batch_size,
        "model.global_batch_size": job.global_batch_size,
        "model.activations_checkpoint_granularity": "full" if again else "null",
        "model.activations_checkpoint_method": layout.recompute or "null",
        "model.activations_checkpoint_num_layers": layout.recompute_layers if again else "null",
        "model.optim.name": job.optimizer,
        "model.data.seq_length": job.seq_length,
        "model.peft.peft_scheme": "lora" if lora else "none",
    }
    if lora:
        values["model.peft.lora_tuning.adapter_dim"] = job.lora_dim
    return [f"{key}={value}" for key, value in values.items()]


def _ranked(found: list[Candidate]) -> list[Candidate]:
    """Those that fit, by time in steps of :data:`_TIE`, then by memory."""
    fitting = [candidate for candidate in found if candidate.fits]
    best = min((candidate.time.total for candidate in fitting), default=1.0)
    return sorted(fitting, key=lambda c: (int((c.time.total / best - 1) / _TIE), c.fullest.total, c.time.total))


def _no_layout(job: Job) -> str:
    sizes = data_parallel_sizes(job)
    return (
        f"--global-batch-size {job.global_batch_size} is a multiple of none of the data-parallel sizes that "
        f"{job.world} GPUs leave ({', '.join(map(str, sizes))}): give a multiple of {sizes[0]}, or another number "
        "of GPUs"
    )


def _no_room(job: Job, machine: Machine, found: list[Candidate]) -> str:
    least = min(found, key=lambda c: c.fullest.total)
    layout, need = least.layout, least.fullest.total
    recompute = f", recompute {layout.recompute} {layout.recompute_layers}" if layout.recompute else ""
    memory = (
        f"{machine.memory / GB:.4g} GB ({machine.usable / GB:.1f} GB without the reserve of {machine.reserve:.0%})"
    )
    return (
        f"no layout fits {job.world} GPUs of {memory}: the least that any needs is {need / GB:.1f} GB per GPU (TP "
        f"{layout.tp} x PP {layout.pp} x DP {layout.dp}, micro-batch {layout.micro_batch_size}{recompute}). "
        + "; ".join(_remedies(job, machine, need))
    )


def _remedies(job: Job, machine: Machine, need: int) -> list[str]:
    """What would make it fit, each looked at by itself."""
    found = [f"Give GPUs of {-(-need / GB // (1 - machine.reserve)):.0f} GB (--gpu-memory)"]
    for factor in (2**power for power in range(_MOST.bit_length())):
        more = replace(job, world=max(job.world, job.gpus_per_node) * factor)
        if more.world > job.world and any(candidate.fits for candidate in candidates(more, machine)):
            found.append(f"or {more.world} GPUs (--gpus)")
            break
    if job.lora_dim is None and any(c.fits for c in candidates(replace(job, lora_dim=32), machine)):
        found.append("or train adapters alone (--peft lora)")
    if job.seq_length >= 1024:
        short = replace(job, seq_length=job.seq_length // 2, mean_length=None)
        if any(c.fits for c in candidates(short, machine)):
            found.append(f"or shorter rows (--seq-length {short.seq_length})")
    return found
