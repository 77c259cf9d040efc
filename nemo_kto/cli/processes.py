"""Processes of this machine that a verb starts for itself, and how they report errors. Not for torchrun and srun."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_kto.errors import KTOError

_STARTED_BY = "NEMO_KTO_STARTED_BY"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torch's launcher gives every process one, and reads it


def run_processes(size: int, arguments: Sequence[str]) -> int:
    """Run ``nemo-kto`` with ``arguments`` on ``size`` processes.

    All of them end when one fails, and the one that failed first speaks for all.

    Returns:
        0, or the exit code of the first failure.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("multiprocessing.api", "agent.server.api"):  # what went wrong is said below
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=f"nemo_kto_{os.getpid()}",  # torch makes one up otherwise, and warns that it did
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    os.environ[_STARTED_BY] = str(os.getpid())
    try:
        elastic_launch(launch, sys.executable)("-m", "nemo_kto.cli.main", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: process {rank} of {size} was ended by {failure.signal_name()}", file=sys.stderr)
            return 1
        if os.path.isfile(failure.error_file):
            print(f"error: {failure.message}", file=sys.stderr)
        return int(failure.exitcode) or 1
    except SignalException as stop:
        print(f"ended by {stop.sigval.name}", file=sys.stderr)
        return 128 + int(stop.sigval)
    finally:
        del os.environ[_STARTED_BY]
    return 0


def tell(error: KTOError) -> None:
    """Print an error; in a process of :func:`run_processes`, leave that to the one that started it."""
    file = os.environ.get(_ERROR_FILE)
    if file and _STARTED_BY in os.environ:
        report = {"message": str(error), "timestamp": int(time.time())}
        Path(file).write_text(json.dumps(report), encoding="utf-8")
    else:
        print(f"error: {error}", file=sys.stderr)
