"""Drill: the disk fills up while checkpoints are saved. Training goes on, and saves again once there is room."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import evidence
import runs
from evidence import Trial
from runs import Job

VARIANTS = (
    ("checkpoints on the full disk, sync save", "checkpoints", "false"),
    ("all of the run on the full disk, async save", "", "true"),
    ("checkpoints on the full disk, async save", "checkpoints", "true"),
    ("all of the run on the full disk, sync save", "", "false"),
)
_NO_CHECKPOINT, _NO_LINES = "NO CHECKPOINT of step", "its lines wait for room"
_ROOM = 8  # checkpoints that the disk holds: those kept, one being written, and metrics and event files


def can_mount(root: Path) -> bool:
    """Whether this user may mount a small file system."""
    probe = root / "probe"
    probe.mkdir(exist_ok=True)
    try:
        with _small_disk(probe, 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def drill(root: Path, layouts: list[str], baselines: dict[str, Path], count: int) -> Generator[Trial]:
    """Run the first ``count`` variants, on the layouts in turn."""
    for number, (name, subdirectory, asynchronous) in enumerate(VARIANTS[:count]):
        layout = layouts[number % len(layouts)]
        trial = Trial(f"{layout}: {name}")
        out = root / f"disk_{number}"
        mounted = out / subdirectory
        mounted.mkdir(parents=True)
        checkpoint = evidence.size(next((baselines[layout] / "checkpoints").glob("step-*")))
        with _small_disk(mounted, _ROOM * checkpoint):
            job = Job(root, out, layout, f"{runs.CALLBACK}.async_save={asynchronous}", "trainer.kto.save_interval=4")
            try:
                _fill_and_free(job, mounted, checkpoint, trial)
            finally:
                runs.kill(job.processes)
                job.process.wait()
            evidence.check_end(out, baselines[layout], runs.STEPS, trial)
            evidence.check_clean(out, trial)
        yield trial


def _fill_and_free(job: Job, mounted: Path, checkpoint: int, trial: Trial) -> None:
    filler = mounted / "filler"
    _require(job, trial, "no first checkpoint", lambda: evidence.newest(job.out) > 0)
    # half a checkpoint fits, so that the save fails half-way; older ones may be deleted meanwhile
    _require(job, trial, "no loud error", lambda: _fill(filler, checkpoint // 2) or _NO_CHECKPOINT in job.log)
    before = evidence.newest(job.out)
    evidence.check_visible(job.out, trial)
    if mounted == job.out:
        _require(job, trial, "no word of metrics.jsonl", lambda: _fill(filler, 0) or _NO_LINES in job.log)
        job.until(lambda: False, 2)  # some steps on a disk without a byte
    filler.unlink()
    _require(job, trial, "no checkpoint once there was room", lambda: evidence.newest(job.out) > before)
    code = job.end(runs.START_S)
    if code != 0:
        trial.faults.append(f"ended with code {code}: {job.log[-1500:]}")
    trial.faults += job.left_over()


def _require(job: Job, trial: Trial, otherwise: str, condition: Callable[[], bool]) -> None:
    if not job.until(condition) and not any(fault.startswith("ended") for fault in trial.faults):
        trial.faults.append(f"{otherwise}; exit code {job.process.poll()}: {job.log[-1500:]}")


def _fill(filler: Path, leave: int) -> bool:
    """Grow a file until ``leave`` bytes of its disk are free. Returns False: nothing is proven by it."""
    state = os.statvfs(filler.parent)
    excess = state.f_bavail * state.f_frsize - leave
    if excess > 0:
        with filler.open("ab") as file:
            try:
                os.posix_fallocate(file.fileno(), file.tell(), excess)
            except OSError:  # the run was quicker; next time
                return False
    return False


@contextmanager
def _small_disk(place: Path, size: int) -> Iterator[None]:
    """A file system of its own, in memory."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True, capture_output=True
    )
    try:
        yield
    finally:
        for _ in range(20):
            if subprocess.run(["umount", str(place)], check=False, capture_output=True).returncode == 0:
                break
            time.sleep(0.5)
        else:  # something still has a file open there
            subprocess.run(["umount", "--lazy", str(place)], check=False, capture_output=True)
