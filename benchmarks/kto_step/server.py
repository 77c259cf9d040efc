"""A worker's side of the line protocol: wait until a step is asked for, measure it, answer. Standard library only.

Lines of JSON on stdin and stdout. The worker says ``{"ready": facts}`` once. Then, for every line
``{"batch": k, "count": false}``, it does optimizer step k (from 0, in order) and answers with what the step cost.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Request:
    """Do one step on global batch ``batch``; with ``count``, also count its operations (such a step is not timed)."""

    batch: int
    count: bool


class StepServer:
    """Answers the driver. What libraries print to stdout goes to stderr from here on."""

    def __init__(self) -> None:
        self._out = os.dup(1)
        os.dup2(2, 1)
        self._born = _used()
        self._before = self._born

    def ready(self, **facts: Any) -> None:
        """Say that the first step can be asked for. Peak memory is that of the steps, not of what came before."""
        preparation = _since(self._born)
        resident = _peak_bytes()
        if _CLEAR.exists():
            _CLEAR.write_text("5")  # VmHWM begins anew
        self._send({"ready": {**facts, "preparation": preparation, "preparation_peak_bytes": resident}})

    def next(self, expected: int) -> Request:
        """Wait for a request, and start the clock.

        Raises:
            SystemExit: the driver has gone, or asks for another batch than the one that comes next in training.
        """
        line = sys.stdin.readline()
        if not line:
            raise SystemExit("the driver has gone")
        request = Request(**json.loads(line))
        if request.batch != expected:
            raise SystemExit(f"asked for batch {request.batch}, but the next one in training is {expected}")
        self._before = _used()
        return request

    def answer(self, **facts: Any) -> None:
        """Stop the clock, and tell what the step has cost."""
        self._send({**_since(self._before), "peak_bytes": _peak_bytes(), **facts})

    def _send(self, message: dict[str, Any]) -> None:
        os.write(self._out, (json.dumps(message) + "\n").encode())


def _used() -> tuple[float, float, float]:
    own = resource.getrusage(resource.RUSAGE_SELF)  # all threads of this process
    return own.ru_utime, own.ru_stime, time.perf_counter()


def _since(before: tuple[float, float, float]) -> dict[str, float]:
    user, system, wall = (now - then for now, then in zip(_used(), before, strict=True))
    return {"user_s": user, "sys_s": system, "wall_s": wall}


def _peak_bytes() -> int:
    """Largest resident set, VmHWM."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
