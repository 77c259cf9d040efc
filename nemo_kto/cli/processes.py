"""Processes of this machine that a verb starts for itself, and how they report errors. Not for torchrun and srun."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_kto import interrupts
from nemo_kto.config.world import LISTEN_FD, world_from_environment
from nemo_kto.errors import KTOError, LostContactError, StoppedEarlyError
from nemo_kto.parents import STARTED_BY

_ERROR_FILE = "NEMO_KTO_ERROR_FILE"
_POLL_S = 0.05
_TELL_S = 45.0  # another rank may still be importing what it trains with
_GRACE_S = 25.0
"""Once a rank has failed, how long the others may take to end. Ranks that stop together have saved before any ends."""


def run_processes(size: int, arguments: Sequence[str]) -> int:
    """Run ``nemo-kto`` with ``arguments`` on ``size`` processes, and pass signals on to them.

    All of them end when one fails, and the one that failed first speaks for all. A run that a signal stopped, here or
    at any of them, ends as they end: with exit code 4 once they have saved.

    Returns:
        0, or the exit code of the first failure; 1 where a signal ended that process, 128 + n where that was signal
        n and came to this process too.

    Raises:
        StoppedEarlyError: a signal came before any process was started.
    """
    name = interrupts.requested()
    if name is not None:
        raise StoppedEarlyError(f"stopped by {name} before the first step; the same command starts again")
    with tempfile.TemporaryDirectory(prefix="nemo_kto_") as folder:
        ranks = [_Rank(number, Path(folder) / f"{number}.json") for number in range(size)]
        with _signals_to(ranks) as received:
            try:
                _start(ranks, arguments)
                first_failed = _wait(ranks)
            finally:
                _clear(ranks)
        return _verdict(ranks, received) if first_failed else 0


def tell(error: KTOError) -> None:
    """Print an error; in a process of :func:`run_processes`, leave that to the one that started it."""
    file = os.environ.get(_ERROR_FILE)
    if file is None:
        print(f"error: {error}", file=sys.stderr)
        tell_torchrun(str(error))
        return
    report = {"message": str(error), "time": time.time(), "is_loss": isinstance(error, LostContactError)}
    draft = Path(f"{file}.{os.getpid()}")
    draft.write_text(json.dumps(report), encoding="utf-8")
    draft.rename(file)


def tell_torchrun(message: str) -> None:
    """Leave a failure where torchrun looks for it: its report on the job, which comes last, then quotes it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with suppress(OSError):
            extra = {"timestamp": str(int(time.time()))}  # torchrun takes the earliest for the cause
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")


def tell_waiting_ranks(message: str) -> None:
    """Where this is one of several ranks that a launcher has started, tell those that wait for it to join.

    Says it before torch is imported for it, so that what this process has printed does not wait. Those that
    ``run_processes`` has started are ended by it.
    """
    with suppress(KTOError):
        world = world_from_environment()
        if world.size == 1 or STARTED_BY in os.environ:
            return
        sys.stdout.flush()
        sys.stderr.flush()
        from nemo_kto.distributed.join import tell_waiting

        tell_waiting(world, message, timedelta(seconds=_TELL_S))


@dataclass
class _Rank:
    """One process, and how it ended."""

    number: int
    error_file: Path
    process: subprocess.Popen[bytes] | None = None
    ended: float = field(default=0.0)

    @property
    def code(self) -> int | None:
        return None if self.process is None else self.process.poll()

    @property
    def report(self) -> dict[str, Any]:
        """What :func:`tell` left; empty where it was not called."""
        return dict(json.loads(self.error_file.read_text("utf-8"))) if self.error_file.exists() else {}

    def send(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    @property
    def blame(self) -> tuple[bool, bool, float]:
        """Sorts those that failed, the culprit first: not a rank that only missed another, or was told to end."""
        report = self.report
        return report.get("is_loss", False), self.code == -signal.SIGTERM, report.get("time", self.ended)


def _start(ranks: Sequence[_Rank], arguments: Sequence[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(len(ranks) + 128)  # rank 0 serves it later, and the others may come first
        command = [sys.executable, "-m", "nemo_kto.cli.main", *arguments]
        shared = {
            **os.environ,
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])},
            **{"WORLD_SIZE": str(len(ranks)), "LOCAL_WORLD_SIZE": str(len(ranks)), STARTED_BY: str(os.getpid())},
        }
        shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(ranks))))
        for rank in ranks:
            own = {"RANK": str(rank.number), "LOCAL_RANK": str(rank.number), _ERROR_FILE: str(rank.error_file)}
            fds: tuple[int, ...] = ()
            if rank.number == 0:
                fds = (listener.fileno(),)
                own[LISTEN_FD] = str(listener.fileno())
            with interrupts.shielded():  # until the process listens; only then can it heed a signal
                rank.process = subprocess.Popen(
                    command, env=shared | own, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=fds
                )


def _wait(ranks: Sequence[_Rank]) -> bool:
    """Wait for all; whether one failed. The others are then told to end, and made to after a while."""
    deadline: float | None = None
    running = list(ranks)
    while running:
        for rank in [rank for rank in running if rank.code is not None]:
            running.remove(rank)
            rank.ended = time.time()
            if rank.code != 0 and deadline is None:
                deadline = time.monotonic() + _GRACE_S
                for other in running:
                    other.send(signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            for rank in running:
                rank.send(signal.SIGKILL)
        time.sleep(_POLL_S)
    return deadline is not None


def _clear(ranks: Sequence[_Rank]) -> None:
    """Leave nothing running that a failed rank has started, nor a rank when this process is interrupted itself."""
    for rank in ranks:
        if rank.process is not None and rank.code != 0:
            with suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.wait()


def _verdict(ranks: Sequence[_Rank], received: Sequence[int]) -> int:
    culprit = min((rank for rank in ranks if rank.code != 0), key=lambda rank: rank.blame)
    code, report = culprit.code or 1, culprit.report
    if code > 0:
        if report:
            print(f"error: {report['message']}", file=sys.stderr)
        return code
    ended_by = signal.Signals(-code)
    print(f"error: process {culprit.number} of {len(ranks)} was ended by {ended_by.name}", file=sys.stderr)
    return 128 + ended_by if ended_by in received else 1


@contextmanager
def _signals_to(ranks: Sequence[_Rank]) -> Iterator[list[int]]:
    """Pass signals on; yields those that came."""
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for rank in ranks:
            rank.send(number)

    before = {number: signal.signal(number, forward) for number in interrupts.HEEDED}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
