"""A plan as text for a terminal. GB are 10^9 bytes."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_kto.planning.duration import step_flops
from nemo_kto.planning.layouts import Candidate
from nemo_kto.planning.memory import RankMemory
from nemo_kto.planning.plan import Plan, overrides
from nemo_kto.planning.request import GB, Layout
from nemo_kto.planning.shape import stage_elements

_MEMORY = ("weights", "grads", "optim", "activ", "head", "work", "swap", "total")
_HEAD = ("", "TP", "PP", "DP", "SP", "recompute", "micro", *_MEMORY, "host/node", "time")
_NOTE = """\
GB are 10^9 bytes, of the fullest rank. head: the LM head's chunk of logits and its gradients, on the last stage; work:
a layer's backward; swap: the policy's second copy while the reference scores, when nothing of activ, head and work
exists. total: the highest sum at any one time. host/node: pinned memory of the swap. time: relative to the quickest,
from assumed speeds (docs/sizing.md); within 5 % the layout that needs less memory comes first."""


def render(plan: Plan, model: str, top: int) -> str:
    """The request, the first ``top`` layouts, and the command to paste."""
    lines = [_request(plan, model), "", *_table(plan, top), "", _NOTE, "", *_choice(plan)]
    return "\n".join(lines)


def _request(plan: Plan, model: str) -> str:
    job, machine = plan.job, plan.machine
    nodes = max(1, job.world // job.gpus_per_node)
    size = stage_elements(job.arch, 1, 1, 0) / 1e9
    kind = "all weights" if job.lora_dim is None else f"LoRA of rank {job.lora_dim}"
    return (
        f"{model}: {size:.2f} billion parameters on {nodes} x {job.world // nodes} GPUs of "
        f"{machine.memory / GB:.4g} GB ({machine.usable / GB:.1f} without the reserve of {machine.reserve:.0%})\n"
        f"rows of {job.seq_length} tokens (mean {job.tokens_per_row}), {job.global_batch_size} per step, "
        f"{'bf16' if job.bf16 else 'float32'}, {kind}, {job.optimizer}; {step_flops(job):.2e} operations per step\n"
        f"{plan.evaluated} layouts evaluated, {len(plan.fitting)} fit"
    )


def _table(plan: Plan, top: int) -> list[str]:
    rows = [_HEAD, *(_row(plan, number, found) for number, found in enumerate(plan.fitting[:top], start=1))]
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def _memory(rank: RankMemory) -> Sequence[str]:
    """The columns of :data:`_MEMORY`."""
    static = rank.static
    held = (static.weights, static.gradients, static.optimizer, rank.activations, rank.head, rank.work)
    return [f"{size / GB:.1f}" for size in (*held, rank.swap_device, rank.total)]


def _row(plan: Plan, number: int, found: Candidate) -> Sequence[str]:
    layout = found.layout
    host = max(stage.swap_host for stage in found.stages) * min(plan.job.gpus_per_node, plan.job.world)
    return (
        *(str(number), str(layout.tp), str(layout.pp), str(layout.dp), "yes" if layout.sequence_parallel else "no"),
        *(_recompute(layout), str(layout.micro_batch_size)),
        *_memory(found.fullest),
        *(f"{host / GB:.0f}", f"{found.time.total / plan.quickest:.2f}"),
    )


def _nodes(number: int) -> str:
    return "1 node" if number == 1 else f"{number} nodes"


def _recompute(layout: Layout) -> str:
    return "no" if layout.recompute is None else f"{layout.recompute} {layout.recompute_layers}"


def _choice(plan: Plan) -> list[str]:
    job, layout, time = plan.job, plan.best.layout, plan.best.time
    nodes = max(1, job.world // job.gpus_per_node)
    parts = ", ".join(f"{name.replace('_', ' ')} {value / time.total:.0%}" for name, value in vars(time).items())
    settings = overrides(job, layout)
    return [
        f"choice: TP {layout.tp} x PP {layout.pp} x DP {layout.dp}, {plan.best.micro_batches} micro-batches per rank; "
        f"a step takes {time.total:.3g} s at the assumed speeds",
        f"  ({parts})",
        "by pipeline stage" + ("; later ones than 1, but for the last, hold less:" if layout.pp > 3 else ":"),
        *_aligned([("stage", *_MEMORY), *((str(rank.stage), *_memory(rank)) for rank in plan.best.stages)]),
        f"overrides, the same on {'each of ' if nodes > 1 else ''}{_nodes(nodes)} ({job.world // nodes} processes):",
        *(f"  {setting}" + (" \\" if setting is not settings[-1] else "") for setting in settings),
    ]
