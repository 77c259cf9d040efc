"""Requests to end: signal handlers only note them, and the training asks at step boundaries. Stops nothing itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HEEDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that are noted: a scheduler's, and Ctrl-C."""

_first: signal.Signals | None = None
_listener: int | None = None


def listen() -> None:
    """Note signals from now on instead of dying of them. May be called again, to replace other handlers.

    Only the main thread can set handlers; elsewhere nothing happens.
    """
    global _listener
    if threading.current_thread() is not threading.main_thread():
        return
    _listener = os.getpid()
    for number in HEEDED:
        signal.signal(number, _note)


@contextmanager
def shielded() -> Iterator[None]:
    """Processes started inside the block never see these signals: launchers and schedulers signal whole groups.

    A blocked signal stays blocked in whatever is started, also by ``exec``; what arrives here meanwhile is delivered
    when the block ends. Started processes must end by other means, with their parent for instance.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HEEDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def requested() -> str | None:
    """Name of the first signal that was noted, such as ``SIGTERM``; None if there was none."""
    return None if _first is None else _first.name


def forget() -> None:
    """Begin anew: a process that trains several times calls it in between."""
    global _first
    _first = None


def _note(number: int, _frame: FrameType | None) -> None:
    global _first
    if os.getpid() != _listener:
        return  # a fork, such as Megatron's checkpoint writer: it must finish its file, and ends by itself
    if _first is None:
        _first = signal.Signals(number)
    elif number == signal.SIGINT and _first is signal.SIGINT:
        raise KeyboardInterrupt  # Ctrl-C once more: now
