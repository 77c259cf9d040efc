"""A trace of some optimizer steps, for the question where their time goes. Changes nothing of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)


class StepProfiler(Callback):
    """Writes a torch.profiler trace of optimizer steps ``first`` to ``last``, a file per rank, for Perfetto or Chrome.

    Steps are counted from 1, as in ``metrics.jsonl``; a step's trace begins when its batch is there. A run that ends
    in between writes what it has.

    Args:
        folder: where ``trace-rank-N.json.gz``, and what took most time as ``table-rank-N.txt``, go.
        first: step.
        last: step, at least ``first``.
    """

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self._folder, self._first, self._last = folder, first, last
        self._profiler: profile | None = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin before the first step."""
        if trainer.global_step + 1 == self._first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write after the last step."""
        if trainer.global_step >= self._last:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write what there is."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        rank = f"rank-{trainer.global_rank}"
        trace, table = self._folder / f"trace-{rank}.json.gz", self._folder / f"table-{rank}.txt"
        averages = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            table.write_text(averages, encoding="utf-8")
        except OSError as error:
            logger.error("%s cannot be written (%s). Training goes on", self._folder, error)
            return
        last = min(self._last, trainer.global_step)
        logger.info("traced steps %d to %d: %s, %s", self._first, last, trace, table.name)
