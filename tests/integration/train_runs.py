"""The runs that test_train_cli.py looks at: one command each, or two where the second resumes the first."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tiny
from command_line import read_metrics

from nemo_kto.config.locate import checkpoint_steps

ROOT = Path(__file__).resolve().parent.parent.parent
BATCH, ROWS, HELDOUT, BETA = 4, 22, 6, 0.5
STEPS_PER_EPOCH = ROWS // BATCH  # 5, and 2 rows left over
CLOCK = ("step_time_s", "tokens_per_second", "peak_memory_bytes", "reference_bytes")
"""What a step cost."""


@dataclass(frozen=True)
class Run:
    """What one command printed, and what it left behind."""

    code: int
    stdout: str
    stderr: str
    out: Path

    @property
    def training(self) -> list[dict]:
        """Lines of the optimizer steps, without what the clock says."""
        lines = [line for line in read_metrics(self.out / "metrics.jsonl") if "val/loss" not in line]
        return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]

    @property
    def validation(self) -> list[dict]:
        return [line for line in read_metrics(self.out / "metrics.jsonl") if "val/loss" in line]

    @property
    def checkpoints(self) -> list[int]:
        return [step for step, _ in checkpoint_steps(self.out)]


def make_files(root: Path, rows: int, heldout: int) -> Path:
    """A model, another one of the same shape, and records to train on and to validate on; returns ``root``."""
    tiny.make_model(root / "model", num_hidden_layers=2)
    tiny.make_model(root / "other", seed=1, num_hidden_layers=2)
    tiny.make_records(root / "train.jsonl", rows, seed=1)
    tiny.make_records(root / "heldout.jsonl", heldout, seed=2)
    return root


PLAIN = (sys.executable, "-m", "nemo_kto.cli.main", "train")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def train(root: Path, out: str, *words: str, command: tuple[str, ...] = PLAIN, code: int = 0) -> Run:
    """Run the command with a config that suits the tiny model; ``words`` win."""
    given = [
        "pretrained_checkpoint.restore_from_path=model",
        "model.data.data_prefix.train=[train.jsonl]",
        "model.data.data_prefix.validation=[heldout.jsonl]",
        *("model.data.cache_dir=cache", "model.data.seq_length=64", "model.data.num_workers=0"),
        *(f"model.global_batch_size={BATCH}", "model.micro_batch_size=2", "trainer.precision=32"),
        *("model.optim.lr=1e-3", "model.optim.sched.name=Constant", "model.optim.sched.warmup_steps=2"),
        *(f"model.kto.ref_policy_kl_penalty={BETA}", "trainer.kto.max_epochs=3", "trainer.kto.val_check_interval=2"),
        f"exp_manager.explicit_log_dir={out}",
    ]
    keys = {word.split("=")[0] for word in words}
    arguments = [*[word for word in given if word.split("=")[0] not in keys], *words]
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in launcher} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=root, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return Run(done.returncode, done.stdout, done.stderr, root / out)


CALLBACK = "exp_manager.checkpoint_callback_params"
TOP_K = f"{CALLBACK}.save_top_k"
EXACT = ("model.data.num_workers=2", "trainer.kto.save_interval=3", f"{TOP_K}=-1")
DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1", "trainer.kto.max_epochs=2")


def whole_run(root: Path) -> Run:
    """Eight steps, which cross the end of the first epoch. Its own token cache, so that it is the one to fill it."""
    return train(root, "whole", *EXACT, "trainer.kto.max_steps=8", "model.data.cache_dir=cache_of_whole")


def halves_runs(root: Path) -> Run:
    """Four steps, then the same command with a higher max_steps. The interruption lies within the first epoch."""
    first = train(root, "halves", *EXACT, "trainer.kto.max_steps=4")
    assert [line["step"] for line in first.training] == [1, 2, 3, 4]
    return train(root, "halves", *EXACT, "trainer.kto.max_steps=8")


def watched_run(root: Path) -> Run:
    """Validated on one batch after every step; three batches per epoch, as a number.

    Its best checkpoint is the one with the smallest margin: training widens it, so that the newest is not the best.
    """
    return train(
        root,
        "watched",
        *DROPOUT,
        *("trainer.kto.val_check_interval=1", "trainer.kto.limit_val_batches=1", "trainer.kto.limit_train_batches=3"),
        *(f"{TOP_K}=1", f"{CALLBACK}.monitor=val/rewards/margins", f"{CALLBACK}.mode=min"),
    )


def unwatched_run(root: Path) -> Run:
    """Never validated; three batches per epoch, as a fraction."""
    words = ("trainer.kto.limit_val_batches=0", "trainer.kto.limit_train_batches=0.6")
    return train(root, "unwatched", *DROPOUT, *words, "model.data.num_workers=1")


def two_run(root: Path) -> Run:
    """Two processes that the command starts itself, tensor parallel, from another policy than the reference."""
    return train(
        root,
        "two",
        *("trainer.devices=2", "model.tensor_model_parallel_size=2", "trainer.kto.max_steps=3"),
        *("pretrained_checkpoint.restore_from_path=other", "model.kto.reference_from_path=model"),
        *("trainer.kto.val_check_interval=0.5", "model.optim.sched.warmup_steps=1"),
        "exp_manager.profile_steps=[2,2]",
    )


def launched_run(root: Path) -> Run:
    """Two processes of torchrun, data parallel, running the example's file."""
    script = str(ROOT / "examples" / "train_gpt_kto.py")
    return train(root, "launched", "trainer.kto.max_steps=4", command=(*TORCHRUN, script))


def timed_runs(root: Path) -> tuple[Run, list[dict], list[int], Run]:
    """A run that its time ends, its steps and checkpoints then, and the run that goes on from there."""
    words = ("trainer.precision=bf16", "trainer.kto.limit_val_batches=0", "trainer.kto.save_interval=100000")
    words += ("trainer.kto.max_epochs=100000",)
    stopped = train(root, "timed", *words, "exp_manager.max_time_per_run=00:00:00:02", code=4)
    steps, checkpoints = stopped.training, stopped.checkpoints
    return stopped, steps, checkpoints, train(root, "timed", *words, f"trainer.kto.max_steps={len(steps) + 2}")


JOBS = {
    "whole": whole_run,
    "halves": halves_runs,
    "two": two_run,
    "watched": watched_run,
    "unwatched": unwatched_run,
    "timed": timed_runs,
    "launched": launched_run,
}
