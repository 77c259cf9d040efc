"""Requests to end: signal handlers only note them, and the training asks at step boundaries. Stops nothing itself."""

from __future__ import annotations

import atexit
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

HEEDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that are noted: a scheduler's, and Ctrl-C."""

_PATIENT_S = 1.0  # a launcher passes Ctrl-C on to processes that have it from the terminal already

_first: signal.Signals | None = None
_interrupted = math.inf
_listener: int | None = None


def listen() -> None:
    """Note signals from now on instead of dying of them. May be called again, to replace other handlers.

    Those that came before, to a process started :func:`shielded`, are noted too. Only the main thread can set
    handlers; elsewhere nothing happens.
    """
    global _listener
    if threading.current_thread() is not threading.main_thread():
        return
    _listener = os.getpid()
    for number in HEEDED:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEEDED)
    atexit.register(_ignore_late_ones)


def _ignore_late_ones() -> None:
    """Keep the exit code: an interpreter that ends puts the default actions back, and would die of one signal more."""
    for number in (signal.SIGTERM, signal.SIGUSR1):  # not Ctrl-C, which may be all there is against an end that hangs
        if os.getpid() == _listener and signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def shielded() -> Iterator[None]:
    """Processes started inside the block never see these signals: launchers and schedulers signal whole groups.

    A blocked signal stays blocked in whatever is started, also by ``exec``; what arrives here meanwhile is delivered
    when the block ends. Started processes must end by other means, with their parent for instance.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        # multiprocessing starts its tracker with the first process, and unblocks SIGTERM and SIGINT when it has. So
        # before the block: else it would open the shield for the process that is started next
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, HEEDED)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def requested() -> str | None:
    """Name of the first signal that was noted, such as ``SIGTERM``; None if there was none."""
    return None if _first is None else _first.name


def forget() -> None:
    """Begin anew: a process that trains several times calls it in between."""
    global _first, _interrupted
    _first, _interrupted = None, math.inf


def _note(number: int, _frame: FrameType | None) -> None:
    global _first, _interrupted
    if os.getpid() != _listener:
        return  # a fork, such as Megatron's checkpoint writer: it must finish its file, and ends by itself
    now = time.monotonic()
    if _first is None:
        _first = signal.Signals(number)
    if number == signal.SIGINT:
        if now > _interrupted + _PATIENT_S:
            raise KeyboardInterrupt  # Ctrl-C once more: now
        _interrupted = min(_interrupted, now)
