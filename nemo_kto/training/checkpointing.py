"""What happens between two steps: saving, and stopping before the last one. Writes no file itself."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_kto import interrupts
from nemo_kto.checkpoint.retention import Retention
from nemo_kto.errors import CheckpointError, StoppedEarlyError
from nemo_kto.training.stopping import StopAgreement

logger = logging.getLogger(__name__)


class CheckpointKeeper:
    """Saves a run's checkpoints and decides which stay. A save that fails is said and never ends the training.

    Args:
        log_dir: the run's directory; checkpoints go to ``checkpoints/step-NNNNNN``.
        save_interval: optimizer steps between checkpoints.
        monitor: validation metric that ranks checkpoints.
        retention: which ones stay.
        ranks_best: whether every validation is followed by a checkpoint, so that it may be among the best.
    """

    def __init__(
        self, log_dir: Path, save_interval: int, monitor: str, retention: Retention, *, ranks_best: bool
    ) -> None:
        self._log_dir = log_dir
        self._save_interval = save_interval
        self._monitor = monitor
        self._retention = retention
        self._ranks_best = ranks_best
        self._validated: int | None = None
        self._saved: int | None = None
        self._due = False
        self.failure: CheckpointError | None = None
        """Why the newest attempt to save failed; None where it did not."""

    def start(self, trainer: Trainer) -> None:
        """Begin at the step the trainer has reached: its checkpoint, if any, exists already."""
        self._saved = trainer.global_step
        self._retention.load_scores(trainer.global_step)

    def validated(self, trainer: Trainer) -> None:
        """Note what the weights of this step scored."""
        value = trainer.callback_metrics.get(self._monitor)
        if value is None or not self._ranks_best:
            return
        self._validated = trainer.global_step
        if trainer.is_global_zero:
            _or_say(lambda: self._retention.score(trainer.global_step, float(value)))

    def between_steps(self, trainer: Trainer) -> None:
        """Publish what has been written meanwhile, and save if it is time to. All ranks call it.

        After a skipped step it is not: the weights may be what is wrong, and a checkpoint of them would push out one
        of better ones. It is as soon as a step is taken.
        """
        self._finish(trainer, wait=False)
        step = trainer.global_step
        self._due |= step % self._save_interval == 0 or step == self._validated
        if self._due and not trainer.lightning_module.skips.in_a_row:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save this step, unless it is saved."""
        step = trainer.global_step
        self._due = False
        if step == self._saved:
            return
        self._finish(trainer, wait=True)
        target, began = self._log_dir / "checkpoints" / f"step-{step:06d}", time.monotonic()
        try:
            trainer.save_checkpoint(target)
        except CheckpointError as error:
            self._failed(trainer, error)
            return
        self._saved, self.failure = step, None
        logger.info("saved %s, training waited %.1f s", target.name, time.monotonic() - began)
        if not trainer.strategy.writer.is_writing:
            self._published(trainer, target)

    def finish(self, trainer: Trainer) -> None:
        """Save this step, and wait until everything is written."""
        self.save(trainer)
        self.drain(trainer)

    def drain(self, trainer: Trainer) -> None:
        """Wait until everything that was begun is written."""
        self._finish(trainer, wait=True)

    def _finish(self, trainer: Trainer, *, wait: bool) -> None:
        try:
            written = trainer.strategy.writer.finish(wait=wait)
        except CheckpointError as error:
            self._failed(trainer, error)
            return
        if written is not None:
            self._published(trainer, written)

    def _published(self, trainer: Trainer, checkpoint: Path) -> None:
        if trainer.is_global_zero:
            _or_say(lambda: self._retention.published(checkpoint))

    def _failed(self, trainer: Trainer, error: CheckpointError) -> None:
        self.failure, self._saved = error, None
        if trainer.is_global_zero:
            logger.error(
                "NO CHECKPOINT of step %d: %s. Training goes on; older checkpoints stay", trainer.global_step, error
            )


class StepBoundary(Callback):
    """Between two steps, when the first one's validation is done: save if it is time to, and stop if told to.

    It acts when the next step is about to start, not when a step has ended: a checkpoint then holds its step's
    validation too, and a run that goes on from it repeats and misses nothing.

    Args:
        keeper: saves; None where the run keeps no checkpoints.
        agreement: tells whether to stop.
        total_steps: of the run.
    """

    def __init__(self, keeper: CheckpointKeeper | None, agreement: StopAgreement, total_steps: int) -> None:
        self._keeper = keeper
        self._agreement = agreement
        self._total_steps = total_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take signals back from Lightning, which would end the run where it stands."""
        interrupts.listen()
        self._agreement.start()
        trainer._signal_connector.received_sigterm = False
        if self._keeper is not None:
            self._keeper.start(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save and stop, before the next step touches anything.

        Raises:
            StoppedEarlyError: on all ranks, if one of them was told to stop.
        """
        began = time.perf_counter()
        reason = self._agreement.reason(trainer.strategy.groups.device)
        if self._keeper is not None:
            self._keeper.between_steps(trainer)
            if reason is not None:
                self._keeper.finish(trainer)
        if reason is not None:
            raise StoppedEarlyError(self._stopped(trainer, reason))
        pl_module.pause(time.perf_counter() - began)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank the weights just validated."""
        if self._keeper is not None and not trainer.sanity_checking:
            self._keeper.validated(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._keeper is None:
            return
        self._keeper.finish(trainer)
        if self._keeper.failure is not None:
            raise CheckpointError(
                f"the run is done, but its last checkpoint is not written: {self._keeper.failure}. With room on the "
                "disk, the same command trains from the newest checkpoint to the end"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Publish what is being written, where all ranks stop together."""
        if self._keeper is not None and isinstance(exception, StoppedEarlyError):
            self._keeper.drain(trainer)

    def _stopped(self, trainer: Trainer, reason: str) -> str:
        text = f"stopped by {reason} after step {trainer.global_step} of {self._total_steps}; "
        if self._keeper is None:
            return text + "exp_manager.create_checkpoint_callback=false, so nothing was saved"
        if self._keeper.failure is not None:
            return text + f"NOT saved: {self._keeper.failure}; the same command goes on from the newest checkpoint"
        return text + "the same command goes on from there"


def _or_say(action: Any) -> None:
    """Do something that the training can do without."""
    try:
        action()
    except OSError as error:
        logger.error("%s. Training goes on", error)
