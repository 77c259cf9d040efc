"""Other ranks that have gone: recognises the errors that they leave here, and ends a rank that would wait for them.

Sockets tell gloo at once that a peer has gone. NCCL may not notice within a machine, and would wait for its timeout,
so a rank that fails says so in the job's store, and every rank looks there.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import Protocol

from nemo_kto.errors import KTOError, LostContactError

_LOOK_S = 1.0
_HEAR_S = 3.0  # of a rank that was killed there is nothing to hear
_LEAVE_S = 10.0  # a store whose server has gone answers with an error, sooner or later
GRACE_S = 12.0
"""Seconds that a rank gets to end by itself once another has failed: all ranks may be raising the same error."""

_GONE = re.compile(
    r"Connection (closed|reset|refused)|closed by (remote )?peer|Broken pipe|Socket closed|remote process exited"
    r"|ncclRemoteError|Timed out waiting \d+ms|timed out|Timeout waiting for|Wait timeout"
    r"|collective operation timeout|communicator was aborted",
    re.IGNORECASE,
)
_TRANSPORT = ("gloo/", "nccl", "[c10d]")


class Store(Protocol):
    """What is used of torch's stores."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""

    def get(self, key: str) -> bytes:
        """The value."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set a key that has the expected value, or none; its value then."""


_watched: Store | None = None
_rank = 0
_left = threading.Event()
_thread: threading.Thread | None = None
_blocked: list[threading.Thread] = []
_report: list[Callable[[KTOError], None]] = []
_failed = ""
_heard = threading.Event()


def report_with(report: Callable[[KTOError], None]) -> None:
    """Say how an error is shown to the user; without it, it goes to standard error as it is."""
    _report[:] = [report]


def is_loss(error: BaseException) -> bool:
    """Whether torch raised this because a peer has gone, or no longer answers. Errors of our own making are not."""
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    if "torch.distributed.DistNetworkError" in names:
        return True
    text = str(error)
    is_torchs = "torch.distributed.DistError" in names or any(word in text for word in _TRANSPORT)
    return isinstance(error, RuntimeError) and is_torchs and _GONE.search(text) is not None


def lost_contact(error: BaseException) -> LostContactError:
    """What to tell the user about such an error: the lost rank's own words, where it had any.

    A rank tells the others before it closes its connections; the thread that looks there needs a moment to read it.
    """
    if _thread is not None and _thread.is_alive() and threading.current_thread() is not _thread:
        _heard.wait(_HEAR_S)
    if _failed:
        return LostContactError(f"{_failed.rstrip('.')}; this rank lost contact with it ({_reason(error)})")
    return LostContactError(
        f"lost contact with another rank ({_reason(error)}): its own log says why; a training goes on from its newest "
        "checkpoint with the same command"
    )


def failed_elsewhere(message: str) -> LostContactError:
    """What to tell the user where another rank has failed before it joined this one."""
    return LostContactError(f"{message.rstrip('.')}; this rank was waiting for it to join")


def watch(store: Store, rank: int) -> None:
    """Look at the job's store from now on, in a thread; this process ends if another has failed and it cannot.

    Args:
        store: a connection that nothing else uses.
        rank: of this process.
    """
    global _watched, _rank, _left, _thread, _failed
    _watched, _rank, _left, _failed = store, rank, threading.Event(), ""
    _heard.clear()
    _thread = threading.Thread(target=_look, args=(store, _left), daemon=True, name="peers")
    _thread.start()
    # An interpreter that ends while a thread is inside the store aborts: torch cannot take the lock back there.
    atexit.register(leave)


def may_block(thread: threading.Thread) -> None:
    """Note a thread that waits inside torch, perhaps for ever."""
    _blocked[:] = [other for other in _blocked if other.is_alive()] + [thread]


def end_if_blocked(code: int) -> None:
    """End this process at once where such a thread still waits.

    An interpreter that ends in the usual way aborts when torch comes back from the wait and cannot take the lock.
    """
    if any(thread.is_alive() for thread in _blocked):
        _flush()
        os._exit(code)


def leave() -> None:
    """Look no longer: the job is over for this process, and its store may go."""
    global _watched, _thread
    _left.set()
    thread, _watched, _thread = _thread, None, None
    if thread is not None:
        thread.join(_LEAVE_S)
        may_block(thread)


def tell_others(message: str) -> None:
    """Let the other ranks know that this one has failed. Does nothing where there are none."""
    store = _watched
    leave()
    if store is not None:
        try:
            store.compare_set("first", "", f"rank {_rank} failed: {message}")
        except RuntimeError:  # the store has gone with the rank that serves it, which the others notice as well
            return


def _look(store: Store, left: threading.Event) -> None:
    global _failed
    while not left.wait(_LOOK_S):
        try:
            if not store.check(["first"]):
                continue
            failed = _failed = store.get("first").decode()
            _heard.set()
        except RuntimeError:
            if left.wait(_LOOK_S):
                return  # the job has just ended
            failed = "lost contact with rank 0 or its launcher"
            if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                os.kill(os.getpid(), signal.SIGTERM)  # where only the launcher has gone, the ranks can still save
        if not left.wait(GRACE_S):
            _end(LostContactError(f"{failed.rstrip('.')}; this rank was still waiting for it, and ends"))
        return


def _end(error: LostContactError) -> None:
    """End this process from a thread: its main thread waits in a collective that will never come back."""
    if _report:
        _report[0](error)
    else:
        sys.stderr.write(f"error: {error}\n")
    _flush()
    os._exit(error.exit_code)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _reason(error: BaseException) -> str:
    """The telling part of torch's message: without the place in its source, and without a stack."""
    line = str(error).split("\n")[0]
    line = re.sub(r"^\[[^\]]*\]\s*", "", line)
    return line.split(". This ")[0].strip().rstrip(".") or type(error).__name__
