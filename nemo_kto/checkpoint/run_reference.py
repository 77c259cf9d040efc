"""The reference weights of a run, kept once in its directory, so that a resumed run has the very same reference."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import nn

from nemo_kto.checkpoint.dist import damages, load_model
from nemo_kto.checkpoint.saving import CheckpointWriter, Contents
from nemo_kto.checkpoint.together import on_first_rank
from nemo_kto.config import manifest
from nemo_kto.config.resume import run_record
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.errors import CheckpointError

logger = logging.getLogger(__name__)

FOLDER = "reference"


@dataclass(frozen=True)
class Settled:
    """What a run's reference is.

    Attributes:
        identity: SHA-256 of the manifest of the weights that this run keeps; None where it keeps none.
        origin: the kept weights that a resumed run goes on with; None where they come from the source.
    """

    identity: str | None
    origin: Path | None


@dataclass(frozen=True)
class RunReference:
    """Where a run keeps its reference.

    Attributes:
        log_dir: the run's directory.
        source: config key and value that say where a new run takes its reference from.
        load_source: fills the live parameters from there.
        contents: what is kept beside the weights, and of which part of the network.
    """

    log_dir: Path
    source: str
    load_source: Callable[[], None]
    contents: Contents

    @property
    def folder(self) -> Path:
        """The kept weights: a Megatron checkpoint of weights alone."""
        return self.log_dir / FOLDER

    def settle(
        self,
        chunks: Sequence[nn.Module],
        groups: ParallelGroups,
        *,
        resume_from: Path | None,
        may_differ: bool,
        keep: bool,
    ) -> Settled:
        """Load the reference into the live parameters: a new run's from its source, a resumed run's from what it kept.

        Args:
            chunks: model chunks; hold the reference afterwards.
            groups: the layout.
            resume_from: the checkpoint to go on from; None for a new run.
            may_differ: whether a resumed run may take its reference from ``source`` where the kept one is lost.
            keep: whether this run keeps checkpoints, and so its reference.

        Raises:
            CheckpointError: on every rank: it cannot be read or kept, or is not the one the run was started with.
        """
        origin = None if resume_from is None else self._origin(resume_from, may_differ=may_differ)
        if origin is None:
            self.load_source()
        else:
            load_model(chunks, origin, groups, self.contents.part)
        if not keep:
            return Settled(None, origin)
        if origin is None or origin.resolve() != self.folder.resolve():
            on_first_rank(self._make_room, f"{self.folder} cannot be removed")
            CheckpointWriter().save(chunks, self.contents, self.folder, groups)
        return Settled(manifest.identity(self.folder), origin)

    def load_again(self, chunks: Sequence[nn.Module], groups: ParallelGroups, settled: Settled) -> None:
        """Fill the live parameters, in place, with what :meth:`settle` filled them with.

        Raises:
            CheckpointError: on every rank: it can no longer be read.
        """
        place = settled.origin if settled.identity is None else self.folder
        if place is None:
            self.load_source()
        else:
            load_model(chunks, place, groups, self.contents.part)

    def _make_room(self) -> None:
        """Delete the reference of a run that never came to a checkpoint; what is none of ours stays."""
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / manifest.MANIFEST).is_file():
            raise CheckpointError(f"{self.folder} is no reference of a run: move it away")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _origin(self, resume_from: Path, *, may_differ: bool) -> Path | None:
        """What the run that is resumed has kept, checked; None where it is to come from the source."""
        folder = resume_from.resolve().parent.parent / FOLDER
        wanted = run_record(resume_from).get("reference")
        if wanted is None and (folder / manifest.MANIFEST).is_file():
            wanted = manifest.identity(folder)  # no record can be read; what is kept must not be replaced all the same
        if wanted is None:
            return None  # not one of ours, or of a version that kept no reference
        problem = _problem(folder, wanted)
        if problem is None:
            if dist.get_rank() == 0:
                logger.info("the reference is the one that the run was started with, kept in %s", folder)
            return folder
        if not may_differ:
            raise CheckpointError(
                f"{problem}: the run cannot go on with the reference it was started with. Put it back from a copy, or "
                f"set exp_manager.resume_with_changes=true to take it from {self.source}"
            )
        logger.warning("%s: the reference comes from %s", problem, self.source)
        return None


def _problem(folder: Path, wanted: str) -> str | None:
    found = damages(folder)
    if found:
        return found[0]
    return (
        None if manifest.identity(folder) == wanted else f"{folder} holds another reference than the checkpoint's run"
    )
