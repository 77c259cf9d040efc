"""Bytes of one rank, by what they are for. Formulas and where they come from; nothing is measured here.

With e the bytes of a weight and n the parameters of the rank's pipeline stage and tensor-parallel shard:

    weights    n e                 bf16 2, float32 4
    gradients  4 n                 Megatron's contiguous buffers; this project reduces in float32
    optimizer  bf16: 12 n          float32 masters, two Adam moments (Float16OptimizerWithFloat16Params)
               float32: 8 n        the moments alone, the live weights are the masters (FP32Optimizer)
               / DP                with the distributed optimizer, which shards each of them

With LoRA the base has weights alone. The adapters' a parameters are float32 in any precision: 4 a, 4 a and 8 a, the
last over DP with the distributed optimizer. Alignment of shards (64 and 128 elements) is left out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nemo_kto.planning.activations import head_bytes, head_chunk_bytes, layer_bytes, stage_bytes, work_bytes
from nemo_kto.planning.request import Job, Layout, Machine
from nemo_kto.planning.shape import adapter_elements, stage_elements

SWAP_RESERVE = 0.1
"""As :data:`nemo_kto.reference.keeping.RESERVE`, which cannot be imported without torch."""


@dataclass(frozen=True)
class StaticBytes:
    """What a rank holds all the time."""

    parameters: int
    """Their number, adapters included."""
    trained: int
    """The number of those that are trained."""
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank of one pipeline stage. On the device, but for ``swap_host``."""

    stage: int
    static: StaticBytes
    activations: int
    head: int
    """Working memory of the LM head; 0 but on the last stage."""
    work: int
    """Working memory of a layer's or the embedding's backward; never needed together with ``head``."""
    swap_device: int
    """The policy's second copy while the reference is in its place; training's activations do not exist then."""
    swap_host: int
    """Pinned host memory: torch takes the next power of two of every buffer."""
    restore: str
    """Where the policy waits: device, masters or host; ``none`` without a swap."""
    scoring: int
    """What a forward without gradient works with."""

    @property
    def total(self) -> int:
        """The highest sum at any one time, of training or of scoring the reference."""
        training = self.activations + max(self.head, self.work)
        return self.static.total + max(training, self.swap_device + self.scoring)

    def to_json(self) -> dict[str, Any]:
        """All of it, flat, with ``total``."""
        values = asdict(self)
        return {**values.pop("static"), **values, "total": self.total}


def static_bytes(job: Job, layout: Layout, stage: int) -> StaticBytes:
    """Weights, gradients and optimizer state of a rank; see the top of this file."""
    base = stage_elements(job.arch, layout.tp, layout.pp, stage)
    shards = layout.dp if job.optimizer == "distributed_fused_adam" else 1
    if job.lora_dim is None:
        state = (12 if job.bf16 else 8) * base
        return StaticBytes(base, base, base * job.weight_bytes, 4 * base, -(-state // shards))
    adapters = job.arch.num_layers // layout.pp * adapter_elements(job.arch, layout.tp, job.lora_dim)
    weights = base * job.weight_bytes + 4 * adapters
    return StaticBytes(base + adapters, adapters, weights, 4 * adapters, -(-8 * adapters // shards))


def rank_memory(job: Job, layout: Layout, machine: Machine, stage: int) -> RankMemory:
    """Everything a rank of ``stage`` needs."""
    static = static_bytes(job, layout, stage)
    is_last = stage == layout.pp - 1
    tokens = layout.micro_batch_size * job.seq_length
    scoring = layer_bytes(job, layout, tokens) + (head_chunk_bytes(job, layout) if is_last else 0)
    restore, on_device, on_host = _swap(job, layout, machine, static)
    return RankMemory(
        stage=stage,
        static=static,
        activations=stage_bytes(job, layout, stage),
        head=head_bytes(job, layout) if is_last else 0,
        work=work_bytes(job, layout, stage),
        swap_device=on_device,
        swap_host=on_host,
        restore=restore,
        scoring=scoring,
    )


def stages_that_differ(layout: Layout) -> list[int]:
    """Stages of which one is the fullest: the first, the last, and of those between the one with most in flight."""
    return sorted({0, min(1, layout.pp - 1), layout.pp - 1})


def _swap(job: Job, layout: Layout, machine: Machine, static: StaticBytes) -> tuple[str, int, int]:
    """(Where the policy waits, bytes of its copy on the device, pinned host bytes), as ``reference_restore: auto``.

    The program asks the device for its free bytes; the prediction takes all that is not held at that time. With LoRA
    the reference is the base model and nothing is swapped.
    """
    if job.lora_dim is not None:
        return "none", 0, 0
    weights = static.weights
    pinned = 1 << (weights - 1).bit_length()
    if machine.memory - static.total >= weights + SWAP_RESERVE * machine.memory:
        return "device", weights, pinned
    sharded = job.optimizer == "distributed_fused_adam" and layout.dp > 1
    if job.bf16 and not sharded:
        return "masters", 0, pinned
    return "host", 0, 2 * pinned
