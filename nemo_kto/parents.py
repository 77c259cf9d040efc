"""Ends processes whose parent has gone: a killed training must leave nothing that holds memory, a device or files."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

STARTED_BY = "NEMO_KTO_STARTED_BY"
"""Environment variable: the process id of the ``nemo-kto`` that started this rank."""

_POLL_S = 0.5
_ORPHAN_S = 20.0


def follow_parent() -> None:
    """End this process when the one that started it has gone, if that is its business.

    A process that multiprocessing started for us (a tokenizer worker; the manager of Megatron's checkpoint writers,
    which waits for connections for ever) ends at once. A rank whose launcher has gone is asked to stop as by SIGTERM,
    so that it saves, and ends some seconds later in any case. Other processes may outlive who started them.
    """
    if multiprocessing.current_process().name != "MainProcess":
        _in_background(_follow_creator, os.getppid())
    elif STARTED_BY in os.environ:
        _in_background(_follow_launcher, int(os.environ[STARTED_BY]))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        _in_background(_follow_launcher, os.getppid())


def _in_background(follow: object, parent: int) -> None:
    assert callable(follow)
    threading.Thread(target=follow, args=(parent,), daemon=True, name="parents").start()


def _follow_creator(parent: int) -> None:
    # multiprocessing tells who created this process only when it is done importing the main module
    while (creator := multiprocessing.parent_process()) is None:
        if os.getppid() != parent:
            os._exit(1)
        time.sleep(_POLL_S)
    creator.join()
    os._exit(1)


def _follow_launcher(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_S)
    os._exit(1)
