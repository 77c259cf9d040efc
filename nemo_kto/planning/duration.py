"""Seconds of one optimizer step, to compare layouts with. Speeds are assumptions (:class:`Machine`), not measurements.

Operations: a product of an [m, k] with a [k, n] matrix is 2 m k n. With W elements in a layer's matrices, a token
costs 2 W forward, and backward twice that, or once where the base is frozen; attention over a causal row of S tokens
2 S A D forward (half of all S x S pairs) and 2.5 times that backward, as its kernel makes scores again; the head 2 H V
forward and twice that backward. All positions count as responses: an upper bound for the head. A KTO step is

    reference   rows and mismatched pairs, forward       2 M micro-batches
    KL          mismatched pairs, forward                M
    training    rows, forward and backward               M       and recomputed layers' forward once more

A pass of M micro-batches over P stages takes M + P - 1 turns of the slowest stage, which is the one with the head.

Bytes: a layer's forward all-reduces two [tokens, H] over t ranks, 2 (t - 1) / t of them each over NVLink (as
reduce-scatter and all-gather with sequence parallelism), and so does its backward. A stage passes [tokens, H] on, over
the network where there are several nodes. Gradients: 4 n bytes all-reduced over DP, or reduce-scattered and the
weights gathered again with the distributed optimizer. Nothing is taken to overlap.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from nemo_kto.planning.activations import remakes_logits
from nemo_kto.planning.memory import RankMemory
from nemo_kto.planning.request import Job, Layout, Machine
from nemo_kto.planning.shape import layer_matrices, vocabulary_elements

_OPTIMIZER_TRAFFIC = 34
"""Bytes of GPU memory read and written per parameter: gradient twice (norm, update), master, moments, weight."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go to, on the slowest pipeline stage."""

    compute: float
    tensor_parallel: float
    pipeline: float
    bubble: float
    data_parallel: float
    optimizer: float
    swap: float

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return float(sum(asdict(self).values()))

    def to_json(self) -> dict[str, float]:
        """All of it, with ``total``."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class _Turn:
    """What one micro-batch takes on the slowest stage."""

    compute: float
    tensor_parallel: float
    pipeline: float

    @property
    def total(self) -> float:
        return self.compute + self.tensor_parallel + self.pipeline


def step_time(job: Job, layout: Layout, machine: Machine, fullest: RankMemory) -> StepTime:
    """Seconds of a step.

    Args:
        job: the run.
        layout: how it is laid out.
        machine: what it runs on.
        fullest: the rank that holds most.
    """
    count = layout.micro_batches(job)
    tokens = job.global_batch_size // layout.dp * job.tokens_per_row / count
    forward = _turn(job, layout, machine, tokens, trains=False)
    training = _turn(job, layout, machine, tokens, trains=True)
    parts = [(3 * count, 2, forward), (count, 1, training)]  # (micro-batches, passes that fill the pipeline, turn)
    return StepTime(
        compute=sum(number * turn.compute for number, _, turn in parts),
        tensor_parallel=sum(number * turn.tensor_parallel for number, _, turn in parts),
        pipeline=sum(number * turn.pipeline for number, _, turn in parts),
        bubble=sum((layout.pp - 1) * fills * turn.total for _, fills, turn in parts),
        data_parallel=_data_parallel(job, layout, machine, fullest),
        optimizer=_OPTIMIZER_TRAFFIC * fullest.static.trained / _shards(job, layout) / machine.memory_speed,
        swap=_swap(machine, fullest),
    )


def step_flops(job: Job) -> float:
    """Matrix operations of a step over all GPUs, without recomputation and logits made twice."""
    tokens = job.global_batch_size * job.tokens_per_row
    forward, backward = _layer_flops(job)
    head = 2 * job.arch.hidden_size * job.arch.vocab_size
    head_backward = head * (2 if job.lora_dim is None else 1)
    return tokens * (job.arch.num_layers * (4 * forward + backward) + 4 * head + head_backward)


def _layer_flops(job: Job) -> tuple[float, float]:
    """Per token and layer: forward, backward."""
    matrices = 2 * layer_matrices(job.arch)
    attention = 2 * job.tokens_per_row * job.arch.num_attention_heads * job.arch.head_dim
    return matrices + attention, matrices * (2 if job.lora_dim is None else 1) + 2.5 * attention


def _turn(job: Job, layout: Layout, machine: Machine, tokens: float, *, trains: bool) -> _Turn:
    """One micro-batch on the last stage, forward alone or with its backward."""
    layers = job.arch.num_layers // layout.pp
    forward, backward = (flops * tokens / layout.tp / machine.flops for flops in _layer_flops(job))
    forward, backward = max(forward, machine.launch), max(backward, 2 * machine.launch)
    head = 2 * vocabulary_elements(job.arch, layout.tp) * tokens / machine.flops
    again = _recomputed(layout, layers)
    passes = layers * (2.0 if trains else 1.0) + (again if trains else 0)  # of exchanges: one forward, one backward
    compute = layers * forward + head
    if trains:
        compute += layers * backward + again * forward
        compute += head * ((2 if job.lora_dim is None else 1) + remakes_logits(job, layout))
    hidden = tokens * job.arch.hidden_size * job.weight_bytes
    between = 0.0
    if layout.pp > 1:
        speed = machine.nvlink if job.world <= job.gpus_per_node else machine.network
        between = (hidden / layout.sequence_shards / speed + machine.latency) * (2 if trains else 1)
    return _Turn(compute, passes * 2 * _all_reduce(hidden, layout.tp, machine.nvlink, machine), between)


def _recomputed(layout: Layout, layers: int) -> int:
    """Layers of a stage whose forward runs twice."""
    return layers if layout.recompute == "uniform" else layout.recompute_layers


def _all_reduce(size: float, ranks: int, speed: float, machine: Machine) -> float:
    """Seconds of a ring all-reduce of ``size`` bytes."""
    return 0.0 if ranks == 1 else 2 * (ranks - 1) / ranks * size / speed + machine.latency


def _shards(job: Job, layout: Layout) -> int:
    return layout.dp if job.optimizer == "distributed_fused_adam" else 1


def _data_parallel(job: Job, layout: Layout, machine: Machine, fullest: RankMemory) -> float:
    """Gradients and, sharded, weights. Ranks of a group that share a node share its network links, one per GPU."""
    if layout.dp == 1:
        return 0.0
    inside = max(1, job.gpus_per_node // layout.tp)
    is_local = layout.tp * layout.dp <= job.gpus_per_node
    speed = machine.nvlink if is_local else min(machine.nvlink, inside * machine.network)
    trained, share = fullest.static.trained, (layout.dp - 1) / layout.dp
    if _shards(job, layout) == 1:
        return 2 * share * 4 * trained / speed
    return share * trained * (4 + (4 if job.lora_dim is not None else job.weight_bytes)) / speed


def _swap(machine: Machine, fullest: RankMemory) -> float:
    """The reference goes in; the policy out and back too, where it waits in host memory."""
    copies = {"none": 0, "host": 3}.get(fullest.restore, 1)
    return copies * fullest.static.weights / machine.host_link
