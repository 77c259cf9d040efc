"""Damaged copies of a run and of a Megatron checkpoint, made from good ones, and what must be said of each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from bad_cases import FILES, MODEL, OUT, Bad, overrides

STEP = "checkpoints/step-000001"
ARGUMENTS = ("trainer.kto.max_steps=1", "trainer.kto.limit_val_batches=0", "model.optim.sched.warmup_steps=0")
GOOD = {
    "run": (["train", *overrides(f"{OUT}=run", *ARGUMENTS)], {}),
    "other run": (["train", *overrides(f"{OUT}=other_run", f"{MODEL}=deeper_weights", *ARGUMENTS)], {}),
    "weights": (["convert", "hf-to-megatron", "--input", "model", "--output", "weights"], {}),
}
"""Commands that make what is damaged."""


def _edit(file: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)


def _largest(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)


def _halved(data: bytearray) -> None:
    del data[len(data) // 2 :]


def _flipped(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "holds no manifest.json"),
    "garbled manifest": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    "foreign manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"format": 1, "files": {"../x": {}}}'),
        "lies outside its directory",
    ),
    "lost shard": (lambda folder: _largest(folder).unlink(), "is missing"),
    "cut shard": (lambda folder: _edit(_largest(folder), _halved), "bytes, not"),
    "flipped bit": (lambda folder: _edit(_largest(folder), _flipped), "has changed since it was written"),
    "garbled record": (lambda folder: _edit(folder / "run.json", _flipped), "run.json has changed"),
    "lost random streams": (lambda folder: (folder / "random.safetensors").unlink(), "random.safetensors is missing"),
    "lost index": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
}
"""What is done to a checkpoint, and what its manifest then finds."""
OF_WEIGHTS = ("garbled manifest", "lost shard", "cut shard", "flipped bit", "lost index")
"""Those that a checkpoint of weights alone can suffer; without a manifest it is taken for Megatron's own."""


def damage(here: Path) -> None:
    """Make a damaged copy of the run and of the weights for each damage."""
    for name, (change, _) in DAMAGES.items():
        change(shutil.copytree(here / "run", here / _run(name)) / STEP)
        if name in OF_WEIGHTS:
            change(shutil.copytree(here / "weights", here / _weights(name)))
    # as if Megatron had written it: nothing to check it by
    bare = shutil.copytree(here / "weights", here / "bare")
    (bare / "manifest.json").unlink()
    (bare / ".metadata").write_bytes(b"not a pickle")
    (shutil.copytree(here / "run", here / "lost_reference") / "reference" / "manifest.json").unlink()
    other = shutil.copytree(here / "weights", here / "other_config") / "hf" / "config.json"
    other.write_text(json.dumps({**json.loads(other.read_text()), "intermediate_size": 192}))
    (other.parent.parent / "manifest.json").unlink()


def _run(damage: str) -> str:
    return f"run_{damage.replace(' ', '_')}"


def _weights(damage: str) -> str:
    return f"weights_{damage.replace(' ', '_')}"


def _resume(name: str, *says: str) -> Bad:
    return Bad((f"{OUT}={name}", "trainer.kto.max_steps=3", *ARGUMENTS[1:]), FILES, says)


def _export(name: str, *says: str) -> Bad:
    return Bad(("convert", "megatron-to-hf", "--input", name, "--output", "exported"), FILES, (name, *says))


CHECKPOINTS = {
    **{
        f"resume: {name}": _resume(_run(name), "no checkpoint in", "is whole", says, "start anew")
        for name, (_, says) in DAMAGES.items()
    },
    "resume: lost reference": _resume("lost_reference", "lost_reference/reference", "exp_manager.resume_with_changes"),
    "resume: by name": Bad(
        (f"{OUT}=out", f"exp_manager.resume_from_checkpoint={_run('flipped bit')}/{STEP}"),
        FILES,
        (f"exp_manager.resume_from_checkpoint={_run('flipped bit')}", "is damaged", "has changed"),
    ),
    "resume: other model": Bad(
        (f"{OUT}=out", f"exp_manager.resume_from_checkpoint=other_run/{STEP}", "exp_manager.resume_with_changes=true"),
        FILES,
        ("other_run/", "another model"),
    ),
    **{f"export: {name}": _export(_weights(name), DAMAGES[name][1]) for name in OF_WEIGHTS},
    "export: bare": _export("bare", ".metadata cannot be read"),
    "export: other network": _export("other_config", "saved by another model"),
}
