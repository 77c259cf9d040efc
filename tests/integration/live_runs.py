"""Trainings on two processes that are watched, signalled and killed while they run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from train_runs import CLOCK, PLAIN, TORCHRUN

from nemo_kto.config.locate import checkpoint_steps

STEPS = 160
START_S, STOP_S = 150.0, 60.0
_MARK = "NEMO_KTO_TEST_RUN"
BY_TORCHRUN = (*TORCHRUN, "-m", "nemo_kto.cli.main", "train")


class LiveRun:
    """One start of ``nemo-kto train``; as a context manager it leaves no process behind.

    Args:
        root: holds model and data.
        out: the run's directory, under ``root``.
        words: overrides that win.
        command: what starts it.
        environment: variables for all of its processes.
    """

    def __init__(
        self,
        root: Path,
        out: str,
        *words: str,
        command: tuple[str, ...] = PLAIN,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.out = root / out
        self._mark = uuid.uuid4().hex
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        env = {key: value for key, value in os.environ.items() if key not in launcher}
        env |= {"OMP_NUM_THREADS": "1", _MARK: self._mark, **(environment or {})}
        self._log = root / f"{out}.{self._mark}.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *_arguments(out, words)], cwd=root, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(self, *_: object) -> None:
        while left := self.processes:
            for pid in left:
                send(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.1)
        self.process.wait()

    @property
    def processes(self) -> list[int]:
        """Everything that descends from it, whoever its parent is by now; no zombies."""
        found = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in found if f"{_MARK}={self._mark}".encode() in _environment(pid)]

    @property
    def ranks(self) -> list[int]:
        """The process of each rank."""
        found = self._by_rank
        return [found[rank] for rank in sorted(found)]

    @property
    def rank_numbers(self) -> list[int]:
        """Which ranks these are."""
        return sorted(self._by_rank)

    @property
    def _by_rank(self) -> dict[int, int]:
        found = {}
        for pid in self.processes:
            words = dict(word.partition(b"=")[::2] for word in _environment(pid).split(b"\0"))
            if b"RANK" in words and _parent(pid) == self.process.pid:
                found[int(words[b"RANK"])] = pid
        return found

    @property
    def log(self) -> str:
        """What all its processes have printed."""
        return self._log.read_text()

    @property
    def errors(self) -> list[str]:
        """The messages among it."""
        return [line for line in self.log.splitlines() if line.startswith("error: ")]

    @property
    def last_step(self) -> int:
        """The last step in metrics.jsonl."""
        lines = training_lines(self.out)
        return int(lines[-1]["step"]) if lines else 0

    @property
    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that are there."""
        return [step for step, _ in checkpoint_steps(self.out)]

    def until(self, condition: Callable[[], bool], seconds: float = START_S) -> None:
        """Wait for something to be so."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log
            assert self.process.poll() is None, self.log
            time.sleep(0.02)

    def end(self, seconds: float = STOP_S) -> int:
        """The exit code, once no process is left."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.log}") from None
        self.gone(10)
        return code

    def gone(self, seconds: float) -> None:
        """Wait until no process is left."""
        deadline = time.monotonic() + seconds
        while left := self.processes:
            assert time.monotonic() < deadline, [_name(pid) for pid in left]
            self.process.poll()
            time.sleep(0.05)


def training_lines(out: Path) -> list[dict]:
    """Lines of the optimizer steps in metrics.jsonl, without what the clock says."""
    file = out / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [
        {key: value for key, value in line.items() if key not in CLOCK} for line in lines if "val/loss" not in line
    ]


def send(pid: int, number: int) -> None:
    """Signal a process that may have gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _arguments(out: str, words: tuple[str, ...]) -> list[str]:
    given = [
        *("pretrained_checkpoint.restore_from_path=model", "model.data.data_prefix.train=[train.jsonl]"),
        *("model.data.cache_dir=cache", "model.data.seq_length=64", "model.data.num_workers=1"),
        *("model.global_batch_size=4", "model.micro_batch_size=2", "trainer.precision=32", "model.optim.lr=1e-4"),
        *("model.hidden_dropout=0.1", "model.optim.sched.name=Constant", "model.optim.sched.warmup_steps=2"),
        *("trainer.devices=2", f"trainer.kto.max_steps={STEPS}", "trainer.kto.max_epochs=1000"),
        *("trainer.kto.save_interval=1000", f"exp_manager.explicit_log_dir={out}"),
        "exp_manager.create_tensorboard_logger=false",
    ]
    keys = {word.split("=")[0] for word in words}
    return [*(word for word in given if word.split("=")[0] not in keys), *words]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
    except OSError:
        return "gone"
