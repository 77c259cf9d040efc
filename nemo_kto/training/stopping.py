"""Whether a run ends before its last step: signals and time, agreed on by all ranks. Saves nothing."""

from __future__ import annotations

import signal
import time

import torch
import torch.distributed as dist

from nemo_kto import interrupts

_TIME = 1  # below every signal's code, so that a signal wins


class StopAgreement:
    """Asks all ranks at step boundaries whether one of them was told to stop.

    Args:
        max_seconds: of wall clock since :meth:`start`; None for no limit. Clocks differ between machines, so this too
            is agreed on.
    """

    def __init__(self, max_seconds: float | None) -> None:
        self._max_seconds = max_seconds
        self._deadline: float | None = None

    def start(self) -> None:
        """Start the clock: when training starts, so that a run whose start-up is slow takes at least one step."""
        if self._max_seconds is not None:
            self._deadline = time.monotonic() + self._max_seconds

    def reason(self, device: torch.device) -> str | None:
        """Why to stop, the same answer on every rank; None to go on. All ranks call it.

        Args:
            device: where one number is reduced.
        """
        code = self._own_code()
        if dist.get_world_size() > 1:
            packed = torch.tensor(code, dtype=torch.int32, device=device)
            dist.all_reduce(packed, op=dist.ReduceOp.MAX)
            code = int(packed)
        if code == 0:
            return None
        return "exp_manager.max_time_per_run" if code == _TIME else signal.Signals(code - _TIME).name

    def _own_code(self) -> int:
        name = interrupts.requested()
        if name is not None:
            return int(signal.Signals[name]) + _TIME
        return _TIME if self._deadline is not None and time.monotonic() >= self._deadline else 0
