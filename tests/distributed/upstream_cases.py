"""What the ranks of test_upstream_bugs.py do: each of Megatron's mistakes as it is, and the product beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import training_kit as kit
from training_kit import Run, Setup, batch
from virtual_stage_kit import gpt_step

SHARDED = Setup(optimizer="distributed_fused_adam", lr=1e-2)
"""Two data-parallel ranks share the state. The rate makes a wrong bias correction visible at once."""
PADDED = Setup(pp=2, optimizer="distributed_fused_adam")
"""Tied embeddings in a pipeline have a bucket of their own, and 399 x 64 elements do not fill it."""


def _as(run: Run, kind: type) -> Run:
    """``run`` with its distributed optimizer of another class, which has the same state."""
    from nemo_kto.training.optim import MendedDistributedOptimizer
    from nemo_kto.training.update import parts

    for part in parts(run.optimizer.megatron):
        assert type(part) is MendedDistributedOptimizer
        part.__class__ = kind
    return run


def _distributed(run: Run) -> Any:
    from nemo_kto.training.update import parts

    (part,) = parts(run.optimizer.megatron)
    return part


def shared_step(rank: int, root: Path) -> dict[str, Any]:
    """Go on from a checkpoint, with a load that leaves Megatron's shared step, and with the product's."""
    run = Run(SHARDED, root / "tied")
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from nemo_kto.training.optim import MendedDistributedOptimizer

    class OneStepForAll(MendedDistributedOptimizer):
        load_state_dict = DistributedOptimizer.load_state_dict

    run.train(2)
    run.save(root / "step-2")
    found: dict[str, Any] = {"expected": run.train(3)}
    for name, kind in (("upstream", OneStepForAll), ("ours", MendedDistributedOptimizer)):
        fresh = _as(Run(SHARDED, root / "other", root / "tied"), kind).load(root / "step-2")
        steps = [state["step"] for state in _distributed(fresh).optimizer.state.values()]
        found[name] = {
            "parameters": len(steps),
            "tensors": len({step.data_ptr() for step in steps}),
            "records": fresh.train(1),
            "step": {float(state["step"]) for state in _distributed(fresh).optimizer.state.values()},
        }
        found[name]["records"] += fresh.train(2)
    return found


def key_error(rank: int, root: Path) -> dict[str, Any]:
    """Load with Megatron's own class; it needs no more than a checkpoint that it has written itself."""
    run = Run(SHARDED, root / "tied")
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from nemo_kto.errors import CheckpointError

    run.train(1)
    _as(run, DistributedOptimizer).save(root / "upstream")
    try:
        _as(Run(SHARDED, root / "other"), DistributedOptimizer).load(root / "upstream")
    except CheckpointError as error:
        upstream = repr(error.__cause__)
    fresh = Run(SHARDED, root / "other").load(root / "upstream")
    return {"upstream": upstream, "ours": kit.same(fresh.optimizer_state(), run.optimizer_state())}


def no_state_yet(rank: int, root: Path) -> dict[str, Any]:
    """The template of a load, which Megatron makes from a state_dict that cannot exist before the first step."""
    run = Run(SHARDED, root / "tied")
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from nemo_kto.checkpoint.sharded import sharded_state
    from nemo_kto.training.optim import MendedDistributedOptimizer, prime_state

    def attempt() -> str:
        try:
            sharded_state(run.chunks, run.optimizer.megatron, run.groups, is_loading=True)
        except AssertionError as error:
            return type(error).__name__
        return ""

    upstream = _as(run, DistributedOptimizer) and attempt()
    _distributed(run).__class__ = MendedDistributedOptimizer
    prime_state(run.optimizer.megatron)
    return {"upstream": upstream, "ours": attempt()}


def default_sharding(rank: int, root: Path) -> dict[str, Any]:
    """Megatron's sharded state where the metadata do not say which kind."""
    run = Run(SHARDED, root / "tied")
    from nemo_kto.checkpoint.sharded import sharded_state
    from nemo_kto.gpt.network import unwrap

    run.train(1)
    (chunk,) = run.chunks
    weights = unwrap(chunk).sharded_state_dict(metadata={"dp_cp_group": run.groups.dp})
    try:
        run.optimizer.megatron.sharded_state_dict(weights, metadata={"dp_cp_group": run.groups.dp})
        upstream = ""
    except Exception as error:  # which kind does not matter: nothing can be saved
        upstream = f"{type(error).__name__}: {error}"
    ours = sharded_state(run.chunks, run.optimizer.megatron, run.groups, is_loading=False)
    return {"upstream": upstream, "ours": ours["optimizer"]["param_state_sharding_type"]}


def leaf_views(rank: int, root: Path) -> dict[str, str]:
    """Write a master, which in float32 is a view of the parameter itself."""
    run = Run(SHARDED, root / "tied")
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    run.train(1)
    part = _distributed(run)
    parameter = next(iter(part.model_param_group_index_map))
    tensors = {key: value.clone() for key, value in part._get_main_param_and_optimizer_states(parameter).items()}
    found = {}
    for name, kind in (("upstream", DistributedOptimizer), ("ours", type(part))):
        try:
            kind._set_main_param_and_optimizer_states(part, parameter, tensors)
            found[name] = ""
        except RuntimeError as error:
            found[name] = str(error)
    return found


def padded_buckets(rank: int, root: Path) -> dict[str, Any]:
    """Save and load what several buckets hold, one of them with padding behind it."""
    run = Run(PADDED, root / "tied")
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from nemo_kto.training.optim import MendedDistributedOptimizer

    class Unpadded(MendedDistributedOptimizer):
        get_parameter_state_dp_zero = DistributedOptimizer.get_parameter_state_dp_zero

    run.train(2)
    padding = [
        bucket.grad_data.numel() - bucket.numel_unpadded
        for buffer in _distributed(run).buffers
        for bucket in buffer.buckets
    ]
    state = run.optimizer_state()
    found: dict[str, Any] = {"padding": padding}
    for name, kind in (("upstream", Unpadded), ("ours", MendedDistributedOptimizer)):
        _distributed(run).__class__ = kind
        run.save(root / f"padded-{name}")
        fresh = Run(PADDED, root / "other", root / "tied").load(root / f"padded-{name}")
        found[name] = kit.same(fresh.optimizer_state(), state)
    return found


def divided_loss(rank: int, root: Path) -> dict[str, Any]:
    """A loss that is kept for metrics as it was returned to the schedule, and the sums of the product."""
    run = Run(Setup(), root / "tied")
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    micro_batches, seen = batch(0, run.groups).micro_batches, []

    def step(items, chunk):
        rows = next(items).samples
        positions = torch.arange(rows.tokens.size(1)).expand_as(rows.tokens)

        def finish(hidden):
            loss = hidden.float().square().mean()
            seen.append(loss.item())
            return loss, {"loss": loss.detach()}

        return chunk(rows.tokens, positions, None), finish

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(micro_batches),
        model=run.chunks,
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].samples.tokens.size(1),
        micro_batch_size=kit.MICRO_BATCH,
        forward_only=False,
    )
    addends = []

    def objective(logps, _):
        addends.append(-logps.mean().item())
        return -logps.mean(), {}

    ours = run.passes.train(micro_batches, objective)["loss"].item()
    return {"returned": seen, "kept": [out["loss"].item() for out in outputs], "ours": ours, "addends": addends}


# --- virtual pipeline stages


def virtual_stages(rank: int, root: Path) -> dict[str, tuple[float, float]]:
    """(loss, gradient norm) of one step of Megatron's GPT: without a pipeline, and with two virtual stages a rank."""
    one_by_one = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    from nemo_kto import cpu_backend
    from nemo_kto.distributed import groups

    cpu_backend.install()
    found = {
        "no pipeline": gpt_step(1, None),
        "upstream's defaults": gpt_step(2, 2),
        "one by one": gpt_step(2, 2, **one_by_one),
    }
    groups.destroy()
    return found
