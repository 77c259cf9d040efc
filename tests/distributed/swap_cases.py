"""What the ranks of test_swap.py do: one function per rule of the swap, which returns what it found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training_kit as kit
from training_kit import Setup

SHARDED = "distributed_fused_adam"
ONE = {
    "fp32": Setup(restore="host"),
    "fp32 sharded": Setup(optimizer=SHARDED, restore="device"),
    "bf16": Setup(bf16=True, restore="masters"),
    "bf16 sharded": Setup(optimizer=SHARDED, bf16=True, restore="masters"),
    "bf16 auto": Setup(bf16=True),
}
TWO = {
    "dp2 fp32 sharded": Setup(optimizer=SHARDED, restore="device"),
    "dp2 bf16 sharded": Setup(optimizer=SHARDED, bf16=True, restore="host"),
    "tp2": Setup(tp=2, restore="host"),
    "tp2 bf16": Setup(tp=2, bf16=True, optimizer=SHARDED, restore="masters"),
    "pp2 tied": Setup(pp=2, restore="device"),
    "pp2 tied bf16": Setup(pp=2, bf16=True, optimizer=SHARDED, restore="masters"),
}
DROPOUT = 0.2


class ScoringError(Exception):
    pass


def _run(root: Path, setup: Setup) -> kit.Run:
    kind = "tied" if setup.pp > 1 else "plain"
    return kit.Run(setup, root / f"{kind}-policy", root / f"{kind}-reference")


def _pointers(run: kit.Run) -> list[int]:
    """Addresses of the parameters and of the buffers of Megatron's wrapper."""
    buffers = [buffer for chunk in run.chunks for buffer in chunk.buffers]
    flat = [t for b in buffers for t in (b.param_data, b.grad_data) if t is not None]
    return [t.data_ptr() for t in [p for chunk in run.chunks for p in chunk.parameters()] + flat]


def _restored(root: Path, setup: Setup) -> dict[str, object]:
    """Train two steps, swap with and without an error, and compare everything with what it was."""
    run = _run(root, setup)
    reference = kit.Run(setup, root / f"{'tied' if setup.pp > 1 else 'plain'}-reference").weights()
    run.train(2)
    policy, state, where = run.weights(), run.optimizer_state(), _pointers(run)
    with run.swap.swapped():
        inside, inside_where = run.weights(), _pointers(run)
    found = {
        "inside is reference": kit.same(inside, reference),
        "policy differs": all(not torch.equal(inside[name], policy[name]) for name in policy),
        "back": kit.same(run.weights(), policy),
        "optimizer untouched": kit.same(run.optimizer_state(), state),
        "in place": inside_where == where == _pointers(run),
        "kept as told": run.swap._latest == ("device" if setup.restore == "auto" else setup.restore),
    }

    def fails(*_: object) -> None:
        raise ScoringError

    run.passes.log_probs = fails
    with pytest.raises(ScoringError):
        run.reference.score(kit.batch(0, run.groups))
    found["back after an error"] = kit.same(run.weights(), policy) and not run.swap.active
    found["optimizer untouched by it"] = kit.same(run.optimizer_state(), state)
    found["vocabulary"] = [n.split(".")[-2] for n in policy if "word_embeddings" in n or "output_layer" in n]
    return found


def _modes(rank: int, root: Path) -> dict[str, object]:
    """Half of the modules in eval mode before; what scoring sees and leaves behind."""
    run = _run(root, Setup(dropout=DROPOUT))
    run.train(1)
    modules = [module for chunk in run.chunks for module in chunk.modules()]
    for module in modules[::2]:
        module.training = False
    before = [module.training for module in modules]
    grads = [buffer.grad_data.clone() for chunk in run.chunks for buffer in chunk.buffers]
    seen: list[tuple[bool, bool, bool]] = []
    original = run.passes._sequence_logps

    def spy(hidden: torch.Tensor, *rest: object) -> torch.Tensor:
        logps = original(hidden, *rest)
        seen.append((torch.is_grad_enabled(), any(m.training for m in modules), logps.requires_grad))
        return logps

    run.passes._sequence_logps = spy
    scored = run.reference.score(kit.batch(0, run.groups))
    return {
        "passes": len(seen),
        "quiet": set(seen) == {(False, False, False)},
        "modes kept": before == [module.training for module in modules],
        "grad enabled after": torch.is_grad_enabled(),
        "gradients kept": kit.same(grads, [b.grad_data for chunk in run.chunks for b in chunk.buffers]),
        "free of graph": not any(b.ref_logps.requires_grad or b.ref_kl_logps.requires_grad for b in scored),
    }


class Recorded:
    """Remembers what a reference scored, or repeats it without scoring."""

    def __init__(self, source=None, memory=None) -> None:
        self.source, self.memory, self.next = source, memory or [], 0

    def score(self, step):
        if self.source is not None:
            self.memory.append(self.source.score(step))
            return self.memory[-1]
        self.next += 1
        return self.memory[self.next - 1]


def _with_reference(run: kit.Run, reference: Recorded) -> kit.Run:
    object.__setattr__(run.step, "reference", reference)
    return run


def _streams() -> list[torch.Tensor]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = get_cuda_rng_tracker().get_states()
    return [torch.get_rng_state(), *(states[name].clone() for name in sorted(states))]


def _random(root: Path, setup: Setup) -> dict[str, object]:
    """A run that scores and one that does not must draw the same dropout, through all streams."""
    scoring = _run(root, setup)
    before = _streams()
    memory = Recorded(scoring.reference)
    scoring.reference.score(kit.batch(0, scoring.groups))
    unmoved = kit.same(before, _streams())
    first = _with_reference(scoring, memory).train(4)
    silent = _with_reference(_run(root, setup), Recorded(memory=memory.memory))
    second = silent.train(4)
    undropped = _run(root, Setup(tp=setup.tp)).train(1)
    return {
        "streams unmoved": unmoved,
        "trajectory": first == second and kit.same(scoring.weights(), silent.weights()),
        "dropout was on": first[0]["loss"] != undropped[0]["loss"],
    }


def _hooks(run: kit.Run) -> list[int]:
    """Number of Megatron's parameter-gathering hooks per chunk."""
    return [len(chunk.remove_forward_pre_hook_handles) for chunk in run.chunks]


def _kept_on_host(run: kit.Run):
    (keeper,) = run.swap._keepers
    return keeper._weights


def _overlap(root: Path, bf16: bool) -> dict[str, object]:
    """Parameter gathers that overlap the forward pass, against none."""
    plain = _run(root, Setup(optimizer=SHARDED, bf16=bf16, restore="host"))
    expected = plain.train(5)
    run = _run(root, Setup(optimizer=SHARDED, bf16=bf16, overlap=True, restore="host"))
    hooks = _hooks(run)
    found = run.train(5)
    with run.swap.swapped():  # right after an optimizer step: its gathers have not been waited for
        during = _hooks(run)
        captured = _kept_on_host(run).digest()
    with plain.swap.swapped():
        expected_captured = _kept_on_host(plain).digest()
    return {
        "trajectory": found == expected,
        "captured": captured == expected_captured,
        "weights": kit.same(run.weights(), plain.weights()),
        "hooks": {"before": min(hooks) > 0, "during": during, "restored": hooks == _hooks(run)},
    }


def _refusals(rank: int, root: Path) -> list[str]:
    run = _run(root, Setup())
    from nemo_kto.checkpoint.hf_export import export_hf  # after the run has prepared Megatron for CPU

    run.train(1)
    policy, messages = run.weights(), []
    with run.swap.swapped():
        acts = (
            run.optimizer.step,
            lambda: run.save(root / "refused"),
            lambda: export_hf(run.chunks, run.arch, run.groups, run.hf_dir, root / "refused_hf"),
        )
        for act in acts:
            with pytest.raises(RuntimeError) as refused:
                act()
            messages.append(str(refused.value))
        with pytest.raises(RuntimeError) as refused, run.swap.swapped():
            raise AssertionError("a swap inside a swap")
        messages.append(str(refused.value))
    assert kit.same(run.weights(), policy)
    assert not (root / "refused").exists()
    assert not (root / "refused_hf").exists()
    run.optimizer.step()
    return messages


def _drift(root: Path, setup: Setup) -> dict[str, object]:
    """Twenty steps at a rate that moves the policy far; the reference must stand still."""
    run = _run(root, setup)
    fixed = kit.batch(99, run.groups)

    def reference_scores() -> list[torch.Tensor]:
        return [t for b in run.reference.score(fixed) for t in (b.ref_logps, b.ref_kl_logps) if t is not None]

    def policy_scores() -> list[torch.Tensor]:
        return run.passes.score([b.samples for b in fixed], kit.MICRO_BATCH)

    digest, scores, policy = run.swap.reference.digest(), reference_scores(), policy_scores()
    run.train(20)
    moved = [(a - b).abs().min().item() for a, b in zip(policy, policy_scores(), strict=True)]
    return {
        "digest": digest == run.swap.reference.digest(),
        "scores": kit.same(scores, reference_scores()),
        "policy moved": min(moved, default=1.0),
    }


def one_rank(rank: int, root: Path) -> dict[str, object]:
    restored = {name: (lambda _rank, r, setup=setup: _restored(r, setup)) for name, setup in ONE.items()}
    return kit.each(
        {
            **restored,
            "modes": _modes,
            "random": lambda _, r: _random(r, Setup(dropout=DROPOUT)),
            "refusals": _refusals,
            "drift fp32": lambda _, r: _drift(r, ONE["fp32"]),
            "drift bf16 sharded": lambda _, r: _drift(r, ONE["bf16 sharded"]),
        },
        rank,
        root,
    )


def two_ranks(rank: int, root: Path) -> dict[str, object]:
    restored = {name: (lambda _rank, r, setup=setup: _restored(r, setup)) for name, setup in TWO.items()}
    return kit.each(
        {
            **restored,
            "random tp2": lambda _, r: _random(r, Setup(tp=2, dropout=DROPOUT)),
            "overlap fp32": lambda _, r: _overlap(r, bf16=False),
            "overlap bf16": lambda _, r: _overlap(r, bf16=True),
            "drift pp2": lambda _, r: _drift(r, TWO["pp2 tied"]),
        },
        rank,
        root,
    )
