"""When to save and which checkpoints stay. How a checkpoint is written is the strategy's business."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from nemo_kto.config.locate import checkpoint_steps

LATEST = "latest_checkpoint.txt"
"""File in the log directory that names the newest checkpoint."""


class MegatronCheckpoint(Checkpoint):
    """Saves every ``save_interval`` steps, after each validation that can rank it, and at the end.

    Args:
        log_dir: the run's directory; checkpoints go to ``checkpoints/step-NNNNNN``.
        save_interval: optimizer steps between checkpoints.
        monitor: validation metric that ranks checkpoints.
        mode: ``min`` or ``max``.
        save_top_k: how many of the best to keep besides the newest; -1 keeps all, 0 none.
    """

    def __init__(self, log_dir: Path, save_interval: int, monitor: str, mode: str, save_top_k: int) -> None:
        self._log_dir = log_dir
        self._save_interval = save_interval
        self._monitor = monitor
        self._sign = 1.0 if mode == "min" else -1.0
        self._top_k = save_top_k
        self._scores_file = log_dir / "checkpoints" / "scores.json"
        self._scores: dict[int, float] = {}
        self._last_saved: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the scores of the checkpoints before a resume."""
        if self._scores_file.is_file():
            known = json.loads(self._scores_file.read_text(encoding="utf-8"))
            self._scores = {int(step): float(score) for step, score in known.items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save on the interval."""
        if trainer.global_step % self._save_interval == 0:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank the weights just validated, and save them if they may be among the best."""
        value = trainer.callback_metrics.get(self._monitor)
        if trainer.sanity_checking or value is None or self._top_k == 0:
            return
        self._scores[trainer.global_step] = self._sign * float(value)
        if trainer.is_global_zero:
            # not in the checkpoint: that of this step may have been written before it was validated
            self._scores_file.parent.mkdir(exist_ok=True)
            self._scores_file.write_text(json.dumps(self._scores), encoding="utf-8")
        self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        target = self._log_dir / "checkpoints" / f"step-{step:06d}"
        if step != self._last_saved and not target.exists():
            trainer.save_checkpoint(target)
        self._last_saved = step
        if trainer.is_global_zero:
            (self._log_dir / LATEST).write_text(f"{target}\n", encoding="utf-8")
            self._forget()

    def _forget(self) -> None:
        if self._top_k == -1:
            return
        kept = checkpoint_steps(self._log_dir)
        ranked = sorted((s for s, _ in kept if s in self._scores), key=lambda step: self._scores[step])
        keep = {*ranked[: self._top_k], kept[-1][0]} if kept else set()
        for step, path in kept:
            if step not in keep:
                shutil.rmtree(path, ignore_errors=True)
