"""The loggers that a config asks for. metrics.jsonl is not one of them: the model writes it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from nemo_kto.config.schema import ExpManagerConfig
from nemo_kto.errors import ConfigError

logger = logging.getLogger(__name__)


class TolerantTensorBoard(TensorBoardLogger):
    """Lightning's TensorBoard logger, which a full disk silences instead of ending the training.

    TensorBoard writes in a thread that dies of the first error, and every later call raises it again; so this logger
    falls silent until the next start. metrics.jsonl goes on.
    """

    _silent = False

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """As Lightning's."""
        self._tolerate(lambda: super(TolerantTensorBoard, self).log_metrics(metrics, step))

    def save(self) -> None:
        """As Lightning's."""
        self._tolerate(super().save)

    def finalize(self, status: str) -> None:
        """As Lightning's."""
        self._tolerate(lambda: super(TolerantTensorBoard, self).finalize(status))

    def _tolerate(self, act: Callable[[], None]) -> None:
        if self._silent:
            return
        try:
            act()
        except (OSError, ValueError) as error:  # Lightning turns what TensorBoard raises into a ValueError
            self._silent = True
            reason = error.__cause__ or error.__context__ or error
            logger.error("TensorBoard files end here: %s. Training goes on, and so does metrics.jsonl", reason)


def loggers(exp: ExpManagerConfig) -> list[Logger]:
    """Lightning's own loggers.

    NeMo's exp_manager would build the same ones, but at every start it moves the files of the run before,
    metrics.jsonl among them, into a folder of their own, so that a resumed run has no curve.

    Raises:
        ConfigError: Weights & Biases is asked for without a login.
    """
    found: list[Logger] = []
    if exp.create_tensorboard_logger:
        found.append(TolerantTensorBoard(exp.explicit_log_dir, name="", version=""))
    if exp.create_wandb_logger:
        _require_wandb_login()
        found.append(WandbLogger(save_dir=exp.explicit_log_dir, **exp.wandb_logger_kwargs))
    return found


def _require_wandb_login() -> None:
    import wandb

    if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not wandb.api.api_key:
        raise ConfigError(
            "exp_manager.create_wandb_logger=true, but there is no login: run `wandb login`, set WANDB_API_KEY, or "
            "WANDB_MODE=offline"
        )
