"""Reads ``metrics.jsonl`` into rows by step. Not a verb: `report` and its curves use it."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_kto.errors import DataError

Row = dict[str, float]

VALIDATION = "val/"


@dataclass
class Run:
    """One run's rows, by step. Undefined means are absent from a row; validation keys carry no prefix."""

    name: str
    train: dict[int, Row] = field(default_factory=dict)
    validation: dict[int, Row] = field(default_factory=dict)

    def series(self, key: str, *, validation: bool = False) -> tuple[list[int], list[float]]:
        """Steps and values of ``key``, where it is defined."""
        rows = self.validation if validation else self.train
        steps = [step for step in sorted(rows) if key in rows[step]]
        return steps, [rows[step][key] for step in steps]


def read_run(path: Path) -> Run:
    """Read one file.

    A resumed run writes steps again: the later line wins, and what followed the step in the abandoned run goes.

    Raises:
        DataError: there is no such file, it holds no rows, or it is not a metrics file.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file (training writes metrics.jsonl under exp_manager.explicit_log_dir)")
    run = Run(name="/".join(path.resolve().parts[-3:-1]) if path.name == "metrics.jsonl" else path.stem)
    newest = -1
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        record = _parse(line, f"{path}:{number}")
        if record is None:
            continue
        step, is_validation = _step(record, f"{path}:{number}")
        if step <= newest:
            _forget_after(step if is_validation else step - 1, run)
        newest = step
        if is_validation:
            run.validation[step] = _numbers(record, VALIDATION)
        else:
            run.train[step] = _numbers(record, "")
    if not run.train and not run.validation:
        raise DataError(f"{path}:1: holds no metrics; has the run finished its first step?")
    return run


def _parse(line: str, where: str) -> dict[str, Any] | None:
    """The line's object; None, with a warning, where a killed run has left half a line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        print(f"warning: {where}: skipped, not a whole JSON object", file=sys.stderr)
        return None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON object is expected, one per step: this is not a metrics.jsonl")
    return record


def _step(record: dict[str, Any], where: str) -> tuple[int, bool]:
    """The step of a row, and whether it is a validation row."""
    is_validation = any(key.startswith(VALIDATION) for key in record)
    step = record.get("step", record.get(VALIDATION + "step"))
    if not isinstance(step, int):
        raise DataError(f"{where}: no integer 'step': this is not a metrics.jsonl")
    return step, is_validation


def _numbers(record: dict[str, Any], prefix: str) -> Row:
    return {
        key.removeprefix(prefix): float(value)
        for key, value in record.items()
        if key.startswith(prefix) and isinstance(value, int | float) and math.isfinite(value)
    }


def _forget_after(step: int, run: Run) -> None:
    """Drop the rows of an abandoned continuation: a resumed run has gone back to ``step``."""
    for rows in (run.train, run.validation):
        for stale in [s for s in rows if s > step]:
            del rows[stale]
