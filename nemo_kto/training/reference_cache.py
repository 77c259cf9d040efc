"""Where the cache of a run's reference is, and filling it before the training. Trains nothing."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch.distributed as dist

from nemo_kto.config.architecture import Architecture
from nemo_kto.config.schema import Config
from nemo_kto.data.batch import StepBatch
from nemo_kto.distributed.collectives import raise_together, reduce_sums
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.errors import CheckpointError, StoppedEarlyError
from nemo_kto.reference.base import Reference
from nemo_kto.reference.cache import CachedReference
from nemo_kto.reference.cache_identity import CacheIdentity
from nemo_kto.reference.columns import ReferenceColumns
from nemo_kto.reference.log_prob_store import LogProbStore
from nemo_kto.training.run_data import RunData
from nemo_kto.training.step import forward_size
from nemo_kto.training.stopping import StopAgreement

logger = logging.getLogger(__name__)


def compute_dtype(run: Config) -> str:
    """``bf16`` or ``fp32``: what the reference is computed in."""
    return "bf16" if run.trainer.is_bf16 else "fp32"


def cached(
    run: Config, network: Architecture, weights: str, scorer: Reference, groups: ParallelGroups
) -> CachedReference:
    """The run's cache in front of ``scorer``. All ranks call it; one of each replica reads what is there.

    Args:
        run: the run.
        network: what computes.
        weights: SHA-256 of the reference checkpoint's weights.
        scorer: the reference itself.
        groups: the layout.
    """
    size = forward_size(run.model)
    if not groups.is_speaker:
        return CachedReference(None, scorer, groups, size)
    identity = CacheIdentity(weights, compute_dtype(run), asdict(network))
    folder = identity.folder(run.model.kto.reference_cache_dir)
    about = json.dumps({"reference": run.model.kto.reference_from_path, **asdict(identity)}, indent=1)
    store = LogProbStore(folder, identity.digest, about=about, speaks=groups.dp_rank == 0)
    if groups.dp_rank == 0:
        logger.info("%d reference log-probs are in %s", len(store), folder)
    return CachedReference(store, scorer, groups, size)


@dataclass(frozen=True)
class Filled:
    """What filling a cache came to.

    Attributes:
        rows: rows that the training and its validation ask for, samples and pairs, over all epochs.
        computed: those that were scored; the others were there, also from an earlier epoch.
        seconds: of wall clock.
        bytes_written: by all ranks.
    """

    rows: int
    computed: int
    seconds: float
    bytes_written: int


def fill(
    cache: CachedReference,
    columns: ReferenceColumns,
    data: RunData,
    groups: ParallelGroups,
    report: Callable[[int, int, CachedReference], None],
) -> Filled:
    """Ask for every row that a run asks for: batch by batch, as it will, so that entries are those it would make.

    What is there already costs a look-up. All ranks call it together.

    Args:
        cache: of the reference, whose weights the model has.
        columns: over ``cache``.
        data: of the run.
        groups: the layout; replicas share out the rows as in training.
        report: called after each batch with how many are done, how many there are, and the cache.

    Raises:
        StoppedEarlyError: a signal came; what was scored is kept.
        CheckpointError: the cache cannot be written.
    """
    began, agreement = time.monotonic(), StopAgreement(None)
    total = data.total_steps + (0 if data.validation_sampler is None else data.validation_sampler.steps_per_epoch)
    for number, batch in enumerate(_batches(data, groups), 1):
        columns.score(batch.to(groups.device))
        _stop_if_unwritten(cache)
        report(number, total, cache)
        reason = agreement.reason(groups.device)
        if reason is not None and number < total:
            cache.close()
            raise StoppedEarlyError(f"stopped by {reason} after {number} of {total} batches; the same command goes on")
    cache.close()
    _stop_if_unwritten(cache)
    written = 0.0 if cache.store is None else float(cache.store.bytes_written)
    size = reduce_sums({"bytes": written}, dist.group.WORLD, groups.device)["bytes"]
    return Filled(cache.rows_asked, cache.rows_computed, time.monotonic() - began, int(size))


def _batches(data: RunData, groups: ParallelGroups) -> Iterator[StepBatch]:
    """Every step of the run, then the validation, each as often as its rows differ."""
    yield from data.train_loader(0, dp_rank=groups.dp_rank, dp_size=groups.dp_size)
    yield from data.validation_loader(dp_rank=groups.dp_rank, dp_size=groups.dp_size) or []


def _stop_if_unwritten(cache: CachedReference) -> None:
    """A run goes on without writing; filling would be for nothing."""
    problem = None if cache.store is None else cache.store.failure
    error = None if problem is None else CheckpointError(f"{problem}: point model.kto.reference_cache_dir elsewhere")
    raise_together(error, dist.group.WORLD)
