"""Questions that only another process can be asked safely: an import may raise, hang, or end the interpreter."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

from nemo_kto.config.world import LISTEN_FD
from nemo_kto.parents import STARTED_BY

_TAIL = 40  # lines of standard error that are kept
_LAUNCHER = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", LISTEN_FD),
}
_LAUNCHERS = ("TORCHELASTIC_", "SLURM_")
"""How the names of a launcher's other variables begin."""


class Child:
    """``python -m MODULE WORD...``, which answers in JSON lines; as a context manager it leaves no process behind.

    Args:
        module: what runs there; it answers through :func:`voice`.
        words: its arguments.
        environment: variables to set for it.
        pass_fds: file descriptors that it inherits.
        as_rank: whether it is this process's rank of the job, and is to know what the launcher says. Others are not:
            packages read that when they are imported, and what is wrong with it would be taken for a fault of theirs.
    """

    def __init__(
        self,
        module: str,
        *words: str,
        environment: dict[str, str] | None = None,
        pass_fds: tuple[int, ...] = (),
        as_rank: bool = False,
    ) -> None:
        env = dict(os.environ) if as_rank else _without_launcher()
        env |= {STARTED_BY: str(os.getpid()), **(environment or {})}
        env.pop("TORCHELASTIC_ERROR_FILE", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            pass_fds=pass_fds,
            start_new_session=True,
        )
        self.timed_out = False
        self._said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors: list[str] = []
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._readers = (
            threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True),
            threading.Thread(target=self._keep, args=(self.process.stderr,), daemon=True),
        )
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next answer, or None: it has ended, or ``seconds`` are over and it is killed."""
        try:
            line = self._said.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self.timed_out = True
            self.kill()
            return None
        return None if line is None else dict(json.loads(line))

    def answers(self, seconds: float) -> Iterator[dict[str, Any]]:
        """All answers, for ``seconds`` at most."""
        deadline = time.monotonic() + seconds
        while (found := self.answer(deadline - time.monotonic())) is not None:
            yield found

    def end(self) -> str:
        """How it ended, in words; empty if well."""
        self.process.wait()
        for reader in self._readers:
            reader.join(2)
        code = self.process.returncode
        if self.timed_out:
            return "it did not answer in time"
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}{self._last()}" if code else ""

    def kill(self) -> None:
        """End it and what it has started."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _last(self) -> str:
        lines = [line for line in self._errors if line.strip()]
        return f": {lines[-1]}" if lines else ""

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            if line.startswith("{"):
                self._said.put(line)
        self._said.put(None)

    def _keep(self, stream: IO[str]) -> None:
        for line in stream:
            self._errors.append(line.rstrip())
            del self._errors[:-_TAIL]


def _without_launcher() -> dict[str, str]:
    """This process's environment, as if nothing but a user had started it."""
    return {
        name: value for name, value in os.environ.items() if name not in _LAUNCHER and not name.startswith(_LAUNCHERS)
    }


class voice:  # noqa: N801, used like a function
    """In a child: what it says goes to its parent, and whatever else is printed goes to standard error."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __call__(self, **answer: Any) -> None:
        """Answer."""
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
