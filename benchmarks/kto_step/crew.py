"""Starts workers and talks to them. Decides nothing about who runs when."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kto_step.contenders import Contender, Kind
from benchmarks.kto_step.settings import Settings

ROOT = Path(__file__).resolve().parent.parent.parent
_LOG_TAIL = 30  # lines of a dead worker's log that are shown


@dataclass(frozen=True)
class Places:
    """Where things are: the interpreter of TRL's environment, the model, the records, and where workers may write."""

    trl_python: Path
    model: Path
    data: Path
    out: Path


class Worker:
    """One contender, all its ranks, started and waiting for its first step.

    Args:
        contender: who.
        places: where.
        steps: how many steps it will be asked for.
    """

    def __init__(self, contender: Contender, places: Places, steps: int) -> None:
        self.contender = contender
        self._folder = places.out / contender.name
        shutil.rmtree(self._folder, ignore_errors=True)  # nothing of an earlier run: no cache, no log
        self._folder.mkdir(parents=True)
        self._settings = Settings(
            model=str(places.model.resolve()),
            data=str(_write_records(contender, places.data, self._folder, steps)),
            out=str(self._folder.resolve()),
            bf16=contender.bf16,
            rows=contender.rows,
            ranks=contender.ranks,
            overrides=contender.overrides,
        )
        self.once = self._prepare()
        self._ranks = [self._start(places, variables) for variables in _launcher(contender.ranks)]
        ready = [self._receive(rank)["ready"] for rank in range(contender.ranks)]
        self.facts: dict[str, Any] = {**ready[0], "once": self.once or ready[0].get("reference_once")}

    def step(self, batch: int, *, count: bool) -> dict[str, Any]:
        """Do one optimizer step and return what it has cost, over all ranks."""
        for rank in self._ranks:
            rank.stdin.write(json.dumps({"batch": batch, "count": count}) + "\n")
            rank.stdin.flush()
        return merged([self._receive(rank) for rank in range(len(self._ranks))])

    def close(self) -> None:
        """End its processes: by themselves after their last step, else by closing their ears."""
        for rank in self._ranks:
            rank.stdin.close()
        for rank in self._ranks:
            try:
                rank.wait(timeout=60)
            except subprocess.TimeoutExpired:
                rank.kill()

    def _prepare(self) -> dict[str, Any] | None:
        if not self.contender.prepare:
            return None
        command = [sys.executable, "-m", "nemo_kto.cli.main", *self.contender.prepare, *self._settings.hydra()]
        before = os.times()
        subprocess.run(command, check=True, cwd=ROOT, env=self._environment({}), stdout=sys.stderr)
        after = os.times()
        rows = len(Path(self._settings.data).read_text(encoding="utf-8").splitlines())
        return {
            "user_s": after.children_user - before.children_user,
            "sys_s": after.children_system - before.children_system,
            "wall_s": after.elapsed - before.elapsed,
            "rows": rows,
        }

    def _start(self, places: Places, variables: dict[str, str]) -> subprocess.Popen[str]:
        of_trl = self.contender.kind is Kind.TRL
        python = places.trl_python.absolute() if of_trl else sys.executable
        module = f"benchmarks.kto_step.{'trl_worker' if of_trl else 'worker'}"
        words = ["aligner"] if self.contender.kind is Kind.ALIGNER else []
        with (self._folder / f"rank{variables.get('RANK', 0)}.log").open("w") as log:
            return subprocess.Popen(
                [str(python), "-m", module, self._settings.to_json(), *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=self._environment(variables),
            )

    def _environment(self, variables: dict[str, str]) -> dict[str, str]:
        """The same for all, but for what a contender asks for. Threads that wait must not count as work: PASSIVE."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MALLOC_"))}
        common = {
            "OMP_NUM_THREADS": str(self.contender.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        }
        return {**inherited, **common, **variables, **self.contender.environment}

    def _receive(self, rank: int) -> dict[str, Any]:
        line = self._ranks[rank].stdout.readline()
        if not line:
            log = self._folder / f"rank{rank}.log"
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL:])
            code = self._ranks[rank].wait()
            name = f"{self.contender.name}, rank {rank}"
            raise SystemExit(f"error: {name}, has ended with exit code {code}. The end of {log}:\n{tail}")
        return json.loads(line)


def merged(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ranks' answers as one: time of the processors and memory add up, the slowest rank's wall time counts."""
    first = answers[0]
    total = {
        name: sum(a[name] for a in answers) for name in ("user_s", "sys_s", "peak_bytes", "flops") if name in first
    }
    return {
        **first,  # losses are of the global batch; collective and swapped bytes are those of one rank
        **total,
        "wall_s": max(answer["wall_s"] for answer in answers),
        "passes": [run for answer in answers for run in answer["passes"]],
    }


def _write_records(contender: Contender, data: Path, folder: Path, steps: int) -> Path:
    """The first records, in the order in which they make TRL's global batches and pairs.

    TRL pairs a prompt with the response before it, we with the one after it. Each of our batches is written backwards,
    so that both score the same pairs, and losses and reference points can be compared.
    """
    lines = data.read_text(encoding="utf-8").splitlines()[: steps * contender.rows]
    if len(lines) < steps * contender.rows:
        raise SystemExit(f"error: {data} holds {len(lines)} records, fewer than {steps} batches: lower --rounds")
    if contender.kind is not Kind.TRL:
        starts = range(0, len(lines), contender.rows)
        lines = [line for start in starts for line in reversed(lines[start : start + contender.rows])]
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path.resolve()


def _launcher(ranks: int) -> list[dict[str, str]]:
    """Each rank's part of the environment that torchrun would set."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**meeting, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
