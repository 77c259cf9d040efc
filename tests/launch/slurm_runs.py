"""One training in the cluster's queue, watched from submission to its end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import trainings
from slurm_cluster import Cluster
from trainings import ROOT, RUN_S, SLURM, START_S, Material

PER_NODE = {"kto.sbatch": "--ntasks-per-node=1", "kto_srun.sbatch": "--ntasks-per-node={ranks}"}


class SlurmRun:
    """A batch script of the examples, submitted as it is.

    Args:
        cluster: where.
        script: name of the file.
        material: model and data.
        name: of the run's directory.
        words: overrides.
        ranks_per_node: processes on each of the two nodes.
        exports_all: whether the job gets the whole environment, or only the variables of this run, by name.
        variables: for the script.
    """

    def __init__(
        self,
        cluster: Cluster,
        script: str,
        material: Material,
        name: str,
        *words: str,
        ranks_per_node: int,
        exports_all: bool = True,
        **variables: str,
    ) -> None:
        self.cluster, self.results = cluster, material.root / name
        self.folder = material.root / f"{name}.submitted"
        self.folder.mkdir()
        sizes = [PER_NODE[script].format(ranks=ranks_per_node), f"--gpus-per-node={ranks_per_node}"]
        env = {**material.variables(self.results), "RANKS_PER_NODE": str(ranks_per_node), **variables}
        exports = "ALL" if exports_all else ",".join(env)
        self.number = cluster.submit(
            *("sbatch", "--parsable", "--nodes=2", *sizes, "--time=60", "--partition=batch", f"--export={exports}"),
            *(str(SLURM / script), *material.words(*words)),
            env=env,
            cwd=self.folder,
        )

    @property
    def log(self) -> str:
        """What the job has printed, over all its starts."""
        return "".join(path.read_text(errors="replace") for path in self.folder.glob(f"*-{self.number}.out"))

    @property
    def starts(self) -> int:
        """How often the script has begun."""
        return self.log.count(f"job {self.number}, start ")

    def until(self, ask: Callable[[], object], what: str, timeout: float = START_S) -> None:
        """Wait for something; fails if the job ends for good before."""

        def over() -> bool:
            return bool(ask()) or self.cluster.state(self.number) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

        trainings.until(over, timeout, lambda: f"{what}\n{self.story()}")
        assert ask(), f"{what}\n{self.story()}"

    def until_launched(self) -> None:
        """Wait until srun has started something, be it a moment ago."""
        words = ("squeue", "--steps", "--noheader", "--jobs", str(self.number), "--format=%i")
        self.until(lambda: f"{self.number}.0" in self.cluster.client(*words).split(), "srun")

    def until_step(self, step: int) -> None:
        """Wait until a step is written down."""
        self.until(lambda: trainings.last_step(self.results) >= step, f"step {step}")

    def until_again(self) -> float:
        """Wait until it has been resumed and has done a step; how many seconds that took."""
        began = time.monotonic()
        what = "resumed, and a step done"
        self.until(lambda: trainings.is_training_again(self.results, self.log), what, 2 * START_S)
        return time.monotonic() - began

    def end(self) -> dict[str, str]:
        """Wait for the end; what Slurm says of the job then."""
        job = self.cluster.wait(self.number, RUN_S)
        assert not list(self.results.glob("requeue.*")), "a note is left"
        return job

    def finish(self, starts: int) -> None:
        """Wait for the end, which must be success after so many starts."""
        job = self.end()
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), self.story()
        assert (job["Restarts"], self.starts) == (str(starts - 1), starts), self.story()
        assert not list(self.results.glob("stalls.*"))

    def story(self) -> str:
        """All there is to know when something went wrong."""
        return f"{self.cluster.job(self.number)}\n{self.log[-4000:]}\n{self.cluster.last_words()}"


def log_names(folder: Path) -> list[str]:
    """The jobs' logs in a folder."""
    return sorted(path.name for path in folder.glob("*.out"))


def make_root(folder: Path, python: str) -> dict[str, str]:
    """A directory that can be the root of tasks, and what ``kto.sbatch`` needs to know in order to run there.

    The interpreter's name is one that exists nowhere else.
    """
    for name in ("usr", "etc", "tmp", "opt"):
        (folder / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (folder / name).symlink_to(f"usr/{name}")
    starter = folder / "opt" / "python"
    starter.write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    starter.chmod(0o755)
    needed = {
        "/usr",
        "/etc",
        str(ROOT),
        str(folder.parent),
        *(os.path.realpath(p) for p in (sys.prefix, sys.base_prefix)),
    }
    outermost = [path for path in sorted(needed) if not any(path.startswith(f"{other}/") for other in needed)]
    mounts = ",".join(f"{path}:{path}" for path in outermost)
    return {"CONTAINER": str(folder), "MOUNTS": mounts, "PYTHON": "/opt/python"}
