"""What the ranks of test_lora.py find out apart from trajectories: what has state, what is saved, what is refused."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lora_cases import RECIPES, Case
from lora_runs import APART, LoraJob
from torch import Tensor
from trajectory_cases import DIST, FULL, SEQUENCE

LEG = 2
"""Steps between two checkpoints of the relay."""
TP2 = Case("adam", tp=2)
RELAYS = {
    "adam": (TP2, Case("adam"), Case("adam", pp=2)),
    "some": (
        Case("some", tp=2, extra=(DIST, SEQUENCE)),
        Case("some", extra=(DIST,)),
        Case("some", pp=2, extra=(DIST,)),
    ),
}
"""Each layout takes over what the one before it saved."""
TAKEN_OVER = {1: {"adam": Case("adam")}, 4: {"some": Case("some", tp=2, pp=2, extra=(DIST,))}}
"""Who goes on after the first leg in another world, to the end."""


def baton(root: Path, recipe: str, leg: int) -> Path:
    return root / f"relay-{recipe}-{leg}"


def _base_of(job: LoraJob) -> dict[str, Tensor]:
    from nemo_kto.gpt.network import unwrap

    return {name: parameter for chunk in job.chunks for name, parameter in unwrap(chunk).global_parameters()}


def _adapters_of(job: LoraJob) -> list[Tensor]:
    from nemo_kto.gpt.lora import low_ranks

    return [parameter for _, _, adapter in low_ranks(job.chunks) for parameter in adapter.parameters()]


def _inner(job: LoraJob) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in getattr(job.optimizer, "chained_optimizers", [job.optimizer])]


# ------------------------------------------------------------------------------------------------ what has state


def footprint(root: Path, case: Case, *extra: str) -> dict[str, Any]:
    """Train two steps, and count."""
    job = LoraJob([*case.overrides(root), *extra])
    base, adapters = _base_of(job), _adapters_of(job)
    before = {name: parameter.detach().clone() for name, parameter in base.items()}
    start = [parameter.detach().clone() for parameter in adapters]
    history = [job.train(batch) for batch in islice(job.batches(), 2)]
    trained = [p for chunk in job.chunks for p in chunk.parameters() if p.requires_grad]
    buffers = [buffer for chunk in job.chunks for buffer in chunk.buffers]
    state = [value for inner in _inner(job) for entry in inner.state.values() for value in entry.values()]
    moments = [value for value in state if isinstance(value, Tensor) and value.dim() > 0]
    return {
        "history": history,
        "moved": all(not torch.equal(p, old) for p, old in zip(adapters, start, strict=True)),
        "base kept": all(torch.equal(p, before[name]) for name, p in base.items()),
        "base dtypes": {p.dtype for p in base.values()},
        "adapter dtypes": {p.dtype for p in adapters} | {p.main_grad.dtype for p in adapters},
        "base with gradient": [n for n, p in base.items() if p.grad is not None or hasattr(p, "main_grad")],
        "trained are the adapters": {id(p) for p in trained} == {id(p) for p in adapters},
        "base numel": sum(p.numel() for p in base.values()),
        "adapter numel": sum(p.numel() for p in adapters),
        "adapter tensors": len(adapters),
        "buffer numel": sum(buffer.grad_data.numel() for buffer in buffers),
        "buffer tensors": sum(len(buffer.params) for buffer in buffers),
        "optimized numel": sum(p.numel() for inner in _inner(job) for g in inner.param_groups for p in g["params"]),
        "moments numel": sum(value.numel() for value in moments),
        "moments dtypes": {value.dtype for value in moments},
    }


def reference_is_the_base(root: Path, case: Case) -> dict[str, Any]:
    """Adapters that are not 0, switched off: bit for bit what a network without adapters says. And errors inside."""
    from nemo_kto.checkpoint.weights import load_weights
    from nemo_kto.gpt.build import build_gpt
    from nemo_kto.gpt.forward import Passes
    from nemo_kto.gpt.live import is_reference
    from nemo_kto.gpt.lora import Adapters, adapters_off

    job = LoraJob(case.overrides(root))
    batch = next(job.batches())
    plain = build_gpt(job.arch, job.config.model, bf16=False, groups=job.groups)
    load_weights(plain, job.arch, job.base, job.groups)
    rows = [micro.samples for micro in batch]
    wanted = Passes(plain, job.groups, job.arch.vocab_size).score(rows)
    policy = job.passes.score(rows)
    found = [micro.ref_logps for micro in job.step.reference.score(batch)]
    switches = [module for chunk in job.chunks for module in chunk.modules() if isinstance(module, Adapters)]
    switches[0].enabled = False  # whoever switched it off wants it off afterwards
    inside = []
    try:
        with adapters_off(job.chunks), adapters_off(job.chunks):
            inside = [module.enabled for module in switches]
            raise KeyError
    except KeyError:
        after = [module.enabled for module in switches]
    switches[0].enabled = True
    job.step.reference._reference._passes = None  # scoring then raises
    try:
        job.step.reference.score(batch)
    except AttributeError:
        held = is_reference(job.chunks), all(module.enabled for module in switches)
    return {
        "equal": all(torch.equal(one, other) for one, other in zip(found, wanted, strict=bool(wanted))),
        "differ": all((one - other).abs().max() > 0.1 for one, other in zip(policy, wanted, strict=bool(wanted))),
        "inside": set(inside),
        "after": (after[0], set(after[1:])),
        "after an error": held,
    }


# ------------------------------------------------------------------------------------------------ checkpoints


def save(job: LoraJob, out: Path) -> None:
    from nemo_kto.checkpoint.saving import CheckpointWriter, Contents
    from nemo_kto.checkpoint.sharded import Part
    from nemo_kto.config.adapter_record import FILE

    documents = {FILE: job.record().to_json()}
    contents = Contents(job.base, job.optimizer, {"steps": LEG}, documents, part=Part.ADAPTERS)
    CheckpointWriter().save(job.chunks, contents, out, job.groups)


def load(job: LoraJob, checkpoint: Path) -> None:
    """As the product resumes (training/strategy.py)."""
    from nemo_kto.checkpoint import dist
    from nemo_kto.checkpoint.sharded import Part
    from nemo_kto.training.optim import prime_state

    prime_state(job.optimizer)
    dist.load(job.chunks, job.optimizer, checkpoint, job.groups, Part.ADAPTERS)


def taken_over(root: Path, case: Case, checkpoint: Path, first: int, steps: int) -> tuple[LoraJob, list[dict]]:
    """A job that started from other numbers goes on from a checkpoint."""
    job = LoraJob(case.overrides(root), seed=99)
    load(job, checkpoint)
    return job, [job.train(batch) for batch in islice(job.batches(first), steps)]


def relay(root: Path, recipe: str) -> dict[str, Any]:
    """One training whose legs run in different layouts."""
    history, adapters = [], []
    for leg, case in enumerate(RELAYS[recipe]):
        if leg == 0:
            job = LoraJob(case.overrides(root))
            lines = [job.train(batch) for batch in islice(job.batches(), LEG)]
        else:
            job, lines = taken_over(root, case, baton(root, recipe, leg - 1), leg * LEG, LEG)
        history += lines
        save(job, baton(root, recipe, leg))
        adapters.append(job.whole())
    return {"history": history, "adapters": adapters}


def resumed(root: Path) -> dict[str, Any]:
    """Same layout: nothing tells an interrupted training from one that was not."""
    job = LoraJob(TP2.overrides(root))
    for batch in islice(job.batches(), LEG):
        job.train(batch)
    again = LoraJob(TP2.overrides(root), seed=99)
    load(again, baton(root, "adam", 0))
    equal = [torch.equal(p, q) for p, q in zip(_adapters_of(job), _adapters_of(again), strict=True)]
    lines = [[j.train(batch) for batch in islice(j.batches(LEG), LEG)] for j in (job, again)]
    equal += [torch.equal(p, q) for p, q in zip(_adapters_of(job), _adapters_of(again), strict=True)]
    return {"history": lines, "equal": all(equal)}


def from_peft(root: Path, case: Case) -> dict[str, Tensor]:
    """A directory of PEFT's, in which modules that are one layer here have an A each, at any layout."""
    return added(root, case, root / APART).whole()


def added(root: Path, case: Case, adapters: Path) -> LoraJob:
    """A network of a layout that gets adapters as scoring and merging give it them."""
    from nemo_kto.checkpoint.adapters import add_adapters
    from nemo_kto.checkpoint.weights import load_weights
    from nemo_kto.gpt.build import build_gpt

    job = LoraJob(case.overrides(root))
    job.chunks = build_gpt(job.arch, job.config.model, bf16=False, groups=job.groups)
    load_weights(job.chunks, job.arch, job.base, job.groups)
    add_adapters(job.chunks, job.arch, adapters, job.base, job.groups)
    return job


def on_one_stage(root: Path) -> dict[str, Any]:
    """Layers 1 and 2 of 4 have adapters: two pipeline stages cannot train them, but can score and merge them."""
    from nemo_kto.gpt.forward import Passes
    from nemo_kto.gpt.lora import merge

    def scores(job: LoraJob) -> list[Tensor]:
        return Passes(job.chunks, job.groups, job.arch.vocab_size).score(rows)

    job = LoraJob([*Case("normal", tp=2).overrides(root), "model.peft.lora_tuning.layer_selection=[1,2]"])
    rows = [micro.samples for micro in next(job.batches())]
    out = root / "one-stage"
    save(job, out)
    seen = {"saved": job.whole(), "wanted": scores(job)}
    staged = added(root, Case("normal", pp=2), out)
    seen |= {"whole": staged.whole(), "added": scores(staged)}
    merge(staged.chunks)
    return {**seen, "merged": scores(staged)}


def _message(action: Any) -> tuple[str, str]:
    try:
        action()
    except Exception as error:  # its type is what the test looks at
        return type(error).__name__, str(error)
    return "", ""


def refusals(root: Path) -> dict[str, tuple[str, str]]:
    from nemo_kto.checkpoint import dist
    from nemo_kto.checkpoint.adapters import load_adapters
    from nemo_kto.checkpoint.sharded import Part

    adapters, other = baton(root, "adam", 0), root / "other"
    job, narrow = LoraJob(TP2.overrides(root)), LoraJob([*TP2.overrides(root), "model.peft.lora_tuning.adapter_dim=3"])
    dist.save_model(job.chunks, job.base, root / "whole", job.groups)
    return {
        "other base": _message(lambda: load_adapters(job.chunks, job.arch, adapters, job.record(other), job.groups)),
        "as a network": _message(lambda: dist.load_model(job.chunks, adapters, job.groups)),
        "a network": _message(lambda: dist.load_model(job.chunks, root / "whole", job.groups, Part.ADAPTERS)),
        "other rank": _message(lambda: dist.load_model(narrow.chunks, adapters, job.groups, Part.ADAPTERS)),
        "good": _message(lambda: load_adapters(job.chunks, job.arch, adapters, job.record(), job.groups)),
    }


def whole_network(root: Path) -> bool:
    """A checkpoint of a network with adapters holds its base under the names that it has without them."""
    from nemo_kto.checkpoint import dist
    from nemo_kto.gpt.build import build_gpt
    from nemo_kto.gpt.network import unwrap

    job = LoraJob(Case("adam").overrides(root))
    (plain,) = build_gpt(job.arch, job.config.model, bf16=False, groups=job.groups)
    dist.load_model([plain], root / "whole", job.groups)
    return all(torch.equal(parameter, _base_of(job)[name]) for name, parameter in unwrap(plain).global_parameters())


def exported(root: Path, recipe: str) -> str:
    """What the tensor-parallel first leg saved, as a directory of PEFT's, written by one process."""
    from nemo_kto.checkpoint.peft_export import export_peft
    from nemo_kto.config.architecture import read_architecture

    out = root / f"exported-{recipe}"
    export_peft(baton(root, recipe, 0), read_architecture(RECIPES[recipe].base(root)), out)
    return str(out)


CASES: dict[int, dict[str, Any]] = {
    1: {
        "plain footprint": lambda rank, root: footprint(root, Case("adam")),
        "bf16 base": lambda rank, root: footprint(root, Case("adam", extra=FULL), "trainer.precision=bf16"),
        "base as reference": lambda rank, root: reference_is_the_base(root, Case("normal")),
        "whole network": lambda rank, root: whole_network(root),
        **{f"exported {name}": lambda rank, root, name=name: exported(root, name) for name in RELAYS},
    },
    2: {
        "sharded footprint": lambda rank, root: footprint(root, Case("adam", extra=(DIST,))),
        "bf16 base": lambda rank, root: footprint(
            root, Case("adam", tp=2, extra=(DIST, SEQUENCE)), "trainer.precision=bf16"
        ),
        "base as reference": lambda rank, root: reference_is_the_base(root, Case("normal", pp=2)),
        **{f"relay {name}": lambda rank, root, name=name: relay(root, name) for name in RELAYS},
        "resumed": lambda rank, root: resumed(root),
        "refusals": lambda rank, root: refusals(root),
        "on one stage": lambda rank, root: on_one_stage(root),
        "peft tp2": lambda rank, root: from_peft(root, Case("swap", tp=2)),
        "peft pp2": lambda rank, root: from_peft(root, Case("swap", pp=2)),
    },
    4: {"peft tp2pp2": lambda rank, root: from_peft(root, Case("swap", tp=2, pp=2))},
}
for _world, _heirs in TAKEN_OVER.items():
    for _recipe, _case in _heirs.items():
        CASES[_world][f"taken over {_recipe}"] = lambda rank, root, recipe=_recipe, case=_case: taken_over(
            root, case, baton(root, recipe, 0), LEG, 4
        )[1]
