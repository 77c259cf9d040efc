"""What a run left behind, and whether it is what an uninterrupted run leaves behind, bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import runs

from nemo_kto.checkpoint.retention import LATEST
from nemo_kto.config import manifest
from nemo_kto.config.locate import checkpoint_steps
from nemo_kto.errors import CheckpointError

_CLOCK = ("step_time_s", "tokens_per_second", "peak_memory_bytes", "reference_bytes")


@dataclass
class Trial:
    """One blow, and what came of it.

    Attributes:
        name: what was done.
        faults: what was not as it must be.
        lost: steps, or lines of metrics.jsonl, that should be there and are not, or are others.
        in_save: whether it hit a checkpoint that was being written.
    """

    name: str
    faults: list[str] = field(default_factory=list)
    lost: int = 0
    in_save: bool = False


def metrics(out: Path, up_to: int = runs.STEPS) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl up to a step, without what the clock says."""
    try:
        text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines = [_parsed(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: line[key] for key in line if key not in _CLOCK} for line in lines if line["step"] <= up_to]


def _parsed(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
        return found if "step" in found else {"step": 0, "no line of ours": line}
    except (ValueError, TypeError):
        return {"step": 0, "no line of ours": line}


def last_step(out: Path) -> int:
    """The newest step whose line is written; 0 where there is none."""
    return max((line["step"] for line in metrics(out) if "loss" in line), default=0)


def newest(out: Path) -> int:
    """Step of the newest visible checkpoint; 0 where there is none."""
    return max(runs.steps_of(out), default=0)


def compare_metrics(out: Path, baseline: Path, up_to: int, trial: Trial) -> None:
    """Note where the lines up to a step are not those of the uninterrupted run."""
    there, wanted = metrics(out, up_to), metrics(baseline, up_to)
    if there == wanted:
        return
    different = [line for line in wanted if line not in there]
    trial.lost += len(different)
    first = different[0] if different else "none missing, but some twice or in another order"
    trial.faults.append(f"metrics.jsonl has {len(there)} lines up to step {up_to}, not {len(wanted)}: {first}")


def compare_checkpoint(out: Path, baseline: Path, step: int, trial: Trial) -> None:
    """Note where a checkpoint's tensors and random streams are not those of the uninterrupted run."""
    mine, wanted = (_digests(run / "checkpoints" / f"step-{step:06d}") for run in (out, baseline))
    if mine != wanted:
        trial.lost += 1
        names = sorted(name for name in {*mine, *wanted} if mine.get(name) != wanted.get(name))
        trial.faults.append(f"step-{step:06d} differs from the uninterrupted run's in {', '.join(names) or 'all'}")


def check_visible(out: Path, trial: Trial) -> None:
    """Note visible checkpoints that are not whole, and a pointer to one that is not there."""
    for _, path in checkpoint_steps(out):
        trial.faults += [f"a torn checkpoint is visible: {line}" for line in manifest.problems(path)]
    pointer = out / LATEST
    if pointer.is_file():
        latest = Path(pointer.read_text(encoding="utf-8").strip()).name
        if not (out / "checkpoints" / latest).is_dir():
            trial.faults.append(f"{LATEST} points to {latest}, which is not there")


def check_clean(out: Path, trial: Trial) -> None:
    """Note what an undamaged run must not have at its end."""
    left = [path.name for end in (".partial", ".damaged*") for path in (out / "checkpoints").glob(f"*{end}")]
    if left:
        trial.faults.append(f"left in checkpoints/ at the end: {', '.join(left)}")


def check_end(out: Path, baseline: Path, step: int, trial: Trial) -> None:
    """Compare a finished run with the uninterrupted one."""
    compare_metrics(out, baseline, step, trial)
    compare_checkpoint(out, baseline, step, trial)
    check_visible(out, trial)


def size(checkpoint: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def _digests(checkpoint: Path) -> dict[str, str]:
    try:
        records = manifest.read(checkpoint)
    except CheckpointError:
        return {}
    wanted = {name: record.sha256 for name, record in records.items() if name.endswith((".distcp", ".safetensors"))}
    return {name: digest for name, digest in wanted.items() if not name.startswith("hf/")}
