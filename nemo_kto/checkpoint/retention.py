"""Which checkpoints of a run stay, and which one is the latest. Writes no checkpoint; runs on one rank."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

from nemo_kto.config import manifest
from nemo_kto.config.locate import checkpoint_steps

LATEST = "latest_checkpoint.txt"
"""File in the log directory that names the newest checkpoint."""

logger = logging.getLogger(__name__)


def point_to(log_dir: Path, checkpoint: Path) -> None:
    """Name the newest checkpoint.

    Raises:
        OSError: it cannot be written.
    """
    manifest.write_text(log_dir / LATEST, f"{checkpoint}\n")


class Retention:
    """The newest few and the best few.

    Args:
        log_dir: the run's directory; checkpoints are in ``checkpoints/step-NNNNNN``.
        mode: of the monitored metric, ``min`` or ``max``.
        last_k: how many of the newest to keep, at least 1.
        top_k: how many of the best to keep besides; -1 keeps all, 0 none.
    """

    def __init__(self, log_dir: Path, mode: str, last_k: int, top_k: int) -> None:
        self._log_dir = log_dir
        self._sign = 1.0 if mode == "min" else -1.0
        self._last_k = last_k
        self._top_k = top_k
        self._scores_file = log_dir / "checkpoints" / "scores.json"
        self._scores: dict[int, float] = {}

    def load_scores(self, up_to: int) -> None:
        """Take over the scores of the validations before a resume.

        Args:
            up_to: the step that is resumed from; what an abandoned continuation scored after it goes.
        """
        try:
            known = json.loads(self._scores_file.read_text(encoding="utf-8"))
            self._scores = {int(step): float(score) for step, score in known.items() if int(step) <= up_to}
        except FileNotFoundError:
            self._scores = {}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            logger.warning(
                "%s cannot be read (%s): the best checkpoints so far are not known", self._scores_file, error
            )
            self._scores = {}

    def score(self, step: int, value: float) -> None:
        """Note what the weights of ``step`` scored; a value that is not finite is the worst.

        Raises:
            OSError: the scores cannot be written.
        """
        self._scores[step] = self._sign * value if math.isfinite(value) else math.inf
        self._scores_file.parent.mkdir(exist_ok=True)
        # not in the checkpoint, which a later validation cannot change
        manifest.write_text(self._scores_file, json.dumps(self._scores))

    def published(self, checkpoint: Path) -> None:
        """Point to a new checkpoint, then delete those that need not stay.

        Raises:
            OSError: the pointer cannot be written.
        """
        point_to(self._log_dir, checkpoint)
        if self._top_k != -1:
            self._forget()

    def _forget(self) -> None:
        there = checkpoint_steps(self._log_dir)
        ranked = sorted((step for step, _ in there if step in self._scores), key=lambda step: self._scores[step])
        newest = [step for step, _ in there[-self._last_k :]]
        keep = {*ranked[: self._top_k], *newest}
        # one that has lost files since is no substitute for the one before it
        if not any(manifest.sizes_match(path) for step, path in there if step in keep):
            return
        for step, path in there:
            if step not in keep:
                shutil.rmtree(path, ignore_errors=True)
