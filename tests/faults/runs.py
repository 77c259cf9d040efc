"""Runs of a tiny model on two processes, as a user starts them, with every process that they start in view."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from nemo_kto.config.locate import checkpoint_steps

ROOT = Path(__file__).resolve().parent.parent.parent

STEPS, VALIDATION = 64, 4
LAYOUTS = {"TP2": ("model.tensor_model_parallel_size=2",), "DP2": ("model.tensor_model_parallel_size=1",)}
CALLBACK = "exp_manager.checkpoint_callback_params"
START_S = 300  # until the first step: packages are imported by three processes
STOP_S = 120  # from a signal until the end: a step, its checkpoint, and imports that a signal does not cut short
GONE_S = 30  # from the first death until the last process is gone
_MARK = "NEMO_KTO_DRILL"  # every process of a job inherits it, whoever its parent is in the end
_DRILL = uuid.uuid4().hex
_POLL_S = 0.1


def make_material(root: Path) -> None:
    """Model and data: ten steps an epoch, so that the runs cross several ends of epochs."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tiny; from pathlib import Path\n"
        "tiny.make_model(Path('model'), num_hidden_layers=2, hidden_size=32, intermediate_size=64)\n"
        "tiny.make_records(Path('train.jsonl'), 40, seed=1); tiny.make_records(Path('heldout.jsonl'), 8, seed=2)\n"
    )
    demo = ROOT / "examples" / "demo"
    subprocess.run([sys.executable, "-c", code, demo], cwd=root, check=True, capture_output=True, timeout=START_S)


class Job:
    """One start of ``nemo-kto train``, which starts two ranks itself.

    Args:
        root: where model and data are.
        out: the run's directory.
        layout: key of ``LAYOUTS``.
        words: overrides over those of all drills.
    """

    count = 0

    def __init__(self, root: Path, out: Path, layout: str, *words: str) -> None:
        Job.count += 1
        self.out = out
        self.mark = f"{_DRILL}.{Job.count}."
        self.log_file = root / f"{out.name}.{Job.count}.log"
        self._metrics_before = _changed(out / "metrics.jsonl")
        self.began = time.time_ns()
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nemo_kto.cli.main", "train", *_arguments(out, layout, words)],
                cwd=root,
                env=_environment(self.mark),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def processes(self) -> list[int]:
        """Everything that runs: the command, its ranks, their data workers and checkpoint writers."""
        return marked(self.mark)

    @property
    def ranks(self) -> list[int]:
        """The ranks, as far as they are there, by their number."""
        found = {}
        for pid in self.processes:
            environment = _read(pid, "environ").split(b"\0")
            rank = next((word[5:] for word in environment if word.startswith(b"RANK=")), None)
            if rank is not None and _parent(pid) == self.process.pid:
                found[int(rank)] = pid
        return [found[rank] for rank in sorted(found)]

    @property
    def has_begun(self) -> bool:
        """Whether it has written, or cut back, metrics.jsonl."""
        return _changed(self.out / "metrics.jsonl") != self._metrics_before

    @property
    def drafts(self) -> list[Path]:
        """Checkpoints that this job is writing."""
        folder = self.out / "checkpoints"
        return [path for path in folder.glob("*.partial") if (_changed(path) or (0, 0))[1] > self.began]

    def until(self, condition: Callable[[], bool], timeout: float = START_S, poll: float = 0.05) -> bool:
        """Wait for a condition; False where the job ends, or time does, before it holds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if condition():
                return True
            if self.process.poll() is not None:
                return condition()
            time.sleep(poll)
        return False

    def end(self, timeout: float) -> int | None:
        """The exit code; None where it does not end in time."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def left_over(self) -> list[str]:
        """Kill what is still there some time after the end, and say what it was."""
        deadline = time.monotonic() + GONE_S
        while (left := self.processes) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        names = [f"process {pid} ({_name(pid)})" for pid in left]
        kill(left)
        self.process.wait()
        return names


def marked(mark: str) -> list[int]:
    """Processes of a job, or of all jobs of this drill, without zombies."""
    found = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return sorted(pid for pid in found if f"{_MARK}={mark}".encode() in _read(pid, "environ"))


def kill(pids: list[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to each that is still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def end_all() -> None:
    """Leave nothing running."""
    while left := marked(_DRILL):
        kill(left)
        time.sleep(_POLL_S)


def listens(pid: int) -> bool:
    """Whether a process handles SIGTERM; in the first moments of an interpreter nobody can."""
    line = next((line for line in _read(pid, "status").splitlines() if line.startswith(b"SigCgt")), b"SigCgt: 0")
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def steps_of(out: Path) -> list[int]:
    """Steps of the checkpoints that are visible."""
    return [step for step, _ in checkpoint_steps(out)]


def _arguments(out: Path, layout: str, words: tuple[str, ...]) -> list[str]:
    given = [
        *("pretrained_checkpoint.restore_from_path=model", "model.data.cache_dir=cache", "model.data.seq_length=64"),
        *("model.data.data_prefix.train=[train.jsonl]", "model.data.data_prefix.validation=[heldout.jsonl]"),
        *("model.data.num_workers=2", "model.global_batch_size=4", "model.micro_batch_size=2", "trainer.precision=32"),
        *("model.hidden_dropout=0.1", "model.attention_dropout=0.1", "model.kto.ref_policy_kl_penalty=0.5"),
        *("model.optim.lr=1e-3", "model.optim.sched.name=Constant", "model.optim.sched.warmup_steps=2"),
        *("trainer.devices=2", "trainer.kto.max_epochs=100", f"trainer.kto.max_steps={STEPS}"),
        *(f"trainer.kto.val_check_interval={VALIDATION}", "trainer.kto.save_interval=2", f"{CALLBACK}.save_top_k=1"),
        f"exp_manager.explicit_log_dir={out.name}",
    ]
    keys = {word.split("=")[0] for word in words}
    return [*(word for word in given if word.split("=")[0] not in keys), *LAYOUTS[layout], *words]


def _environment(mark: str) -> dict[str, str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    known = {key: value for key, value in os.environ.items() if key not in launcher}
    return {**known, "OMP_NUM_THREADS": "1", _MARK: mark}


def _changed(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns


def _read(pid: int, what: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:  # gone, or not ours
        return b""


def _parent(pid: int) -> int:
    line = next((line for line in _read(pid, "status").splitlines() if line.startswith(b"PPid")), b"PPid: 0")
    return int(line.split()[1])


def _name(pid: int) -> str:
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")[:60].strip()
