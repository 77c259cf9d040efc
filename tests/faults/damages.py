"""Ways to damage a run's files, each with what a run must then do. Damages only; runs nothing."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemo_kto.config.locate import checkpoint_steps

Damage = Callable[[Path, random.Random], None]

FALLS_BACK, GOES_ON, REFUSES = "falls back", "goes on", "refuses"
"""The newest checkpoint is reported and set aside; nothing but a side file is hurt; the run must not start."""


@dataclass(frozen=True)
class Kind:
    """One kind of damage.

    Attributes:
        name: what happened to the files.
        outcome: ``FALLS_BACK``, ``GOES_ON`` or ``REFUSES``.
        damage: does it to a run's directory.
        says: what a run that refuses, or one that goes on with a warning, must say.
        loses_newest: whether the newest good checkpoint is the one before the newest.
    """

    name: str
    outcome: str
    damage: Damage
    says: str = ""
    loses_newest: bool = True


def _newest(out: Path) -> Path:
    return checkpoint_steps(out)[-1][1]


def _shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.distcp")))


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _garble(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(path.stat().st_size))


def _cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def _in_newest(act: Callable[[Path, random.Random], None], name: str) -> Damage:
    return lambda out, rng: act(_newest(out) / name, rng)


def _delete(path: Path, _rng: random.Random) -> None:
    path.unlink()


def _empty_newer(out: Path, _rng: random.Random) -> None:
    (out / "checkpoints" / "step-000010").mkdir()


def _leftover_draft(out: Path, _rng: random.Random) -> None:
    shutil.copytree(_newest(out), out / "checkpoints" / "step-000010.partial")


def _half_a_line(out: Path, _rng: random.Random) -> None:
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines) + lines[-1][:40], encoding="utf-8")


def _every_checkpoint(out: Path, rng: random.Random) -> None:
    for _, path in checkpoint_steps(out):
        _flip(_shard(path, rng), rng)


KINDS = (
    Kind("a flipped bit in a shard", FALLS_BACK, lambda out, rng: _flip(_shard(_newest(out), rng), rng)),
    Kind("a cut shard", FALLS_BACK, lambda out, rng: _cut(_shard(_newest(out), rng), rng)),
    Kind("a deleted shard", FALLS_BACK, lambda out, rng: _shard(_newest(out), rng).unlink()),
    Kind("a deleted manifest", FALLS_BACK, _in_newest(_delete, "manifest.json")),
    Kind("a garbled manifest", FALLS_BACK, _in_newest(_garble, "manifest.json")),
    Kind("a garbled .metadata", FALLS_BACK, _in_newest(_garble, ".metadata")),
    Kind("a garbled common.pt", FALLS_BACK, _in_newest(_garble, "common.pt")),
    Kind("a flipped bit in random.safetensors", FALLS_BACK, _in_newest(_flip, "random.safetensors")),
    Kind("a garbled run.json", FALLS_BACK, _in_newest(_garble, "run.json")),
    Kind("a missing metadata.json", FALLS_BACK, _in_newest(_delete, "metadata.json")),
    Kind("an empty directory named like a checkpoint", FALLS_BACK, _empty_newer, loses_newest=False),
    Kind("a left-over draft", GOES_ON, _leftover_draft),
    Kind("a garbled latest_checkpoint.txt", GOES_ON, lambda out, rng: _garble(out / "latest_checkpoint.txt", rng)),
    Kind(
        "a garbled scores.json",
        GOES_ON,
        lambda out, rng: _garble(out / "checkpoints" / "scores.json", rng),
        says="scores.json cannot be read",
    ),
    Kind("half a last line in metrics.jsonl", GOES_ON, _half_a_line),
    Kind(
        "a flipped bit in the kept reference",
        REFUSES,
        lambda out, rng: _flip(_shard(out / "reference", rng), rng),
        says="cannot go on with the reference it was started with",
    ),
    Kind(
        "another reference in place of the kept one",
        REFUSES,
        lambda out, rng: _another_reference(out),
        says="holds another reference",
    ),
    Kind("every checkpoint damaged", REFUSES, _every_checkpoint, says="is whole"),
)


def _another_reference(out: Path) -> None:
    """Weights of the policy, whole by their manifest, where the reference was."""
    shutil.rmtree(out / "reference")
    shutil.copytree(_newest(out), out / "reference")
