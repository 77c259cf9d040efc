"""What a person sees while a run trains: a bar on a terminal, lines in a log file. On the first rank only."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar


def progress_callback() -> ProgressBar:
    """A bar where standard error is a terminal, else lines: a log full of carriage returns helps nobody."""
    return KTOProgressBar() if sys.stderr.isatty() else KTOProgressLines()


class KTOProgressBar(TQDMProgressBar):
    """Lightning's bar with loss, kl and margin, without its version counter."""

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Lightning's one epoch is the whole run, so its number says nothing."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("training")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Loss, kl (nats) and reward margin of the last step."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class KTOProgressLines(ProgressBar):
    """One line per step at first, then at most one every few seconds; one line per validation."""

    def __init__(self, seconds: float = 5.0) -> None:
        super().__init__()
        self._seconds = seconds
        self._last = 0.0
        self._enabled = True

    def disable(self) -> None:
        """Print nothing: called by Lightning on all ranks but the first."""
        self._enabled = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Print the step, if it is the last or the last line is old enough."""
        now = time.monotonic()
        step, total = trainer.global_step, trainer.max_steps
        if step == total or step <= 3 or now - self._last >= self._seconds:
            self._last = now
            self._print(f"step {step}/{total}", trainer.progress_bar_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the validation means."""
        names = ("val/loss", "val/kl", "val/rewards/margins", "val/rewards/accuracies")
        values = {name: trainer.callback_metrics[name] for name in names if name in trainer.callback_metrics}
        self._print(f"step {trainer.global_step}", values)

    def _print(self, head: str, values: Any) -> None:
        if self._enabled:
            body = "  ".join(f"{name} {float(value):.4f}" for name, value in values.items() if name != "v_num")
            sys.stderr.write(f"{head}  {body}\n")
            sys.stderr.flush()
