"""Loaders that hand out this rank's share of one global batch after the other. Not for deciding what is in a batch."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nemo_kto import interrupts
from nemo_kto.config.schema import KTOConfig
from nemo_kto.data.advice import class_balance_warning
from nemo_kto.data.batch import KTOBatch, Rows, StepBatch
from nemo_kto.data.collate import BatchLayout, collate_step
from nemo_kto.data.sampler import GlobalBatchSampler
from nemo_kto.data.store import StoreSummary, TokenStore
from nemo_kto.objective.counts import BatchCounts

logger = logging.getLogger(__name__)


def _tensors(batch: KTOBatch) -> tuple[Tensor, ...]:
    """Everything in a batch that no reference has scored yet."""
    samples, kl_rows = batch.samples, batch.kl_rows
    return (
        *(samples.tokens, samples.labels, kl_rows.tokens, kl_rows.labels),
        *(batch.desirable, batch.has_partner, batch.index),
    )


def _batch(tensors: Iterable[Tensor]) -> KTOBatch:
    tokens, labels, kl_tokens, kl_labels, desirable, has_partner, index = tensors
    return KTOBatch(Rows(tokens, labels), Rows(kl_tokens, kl_labels), desirable, has_partner, index)


class LoadedStep(StepBatch):
    """A :class:`StepBatch` that torch's loader can pin in memory, and that travels between processes by value."""

    def pin_memory(self) -> LoadedStep:
        """The same share in page-locked memory; the loader calls it where there is a CUDA device."""
        return replace(self, micro_batches=tuple(_batch(t.pin_memory() for t in _tensors(b)) for b in self))


_Arrays: TypeAlias = list[list[Any]]


_Packed: TypeAlias = tuple[_Arrays, BatchCounts, int | None]


def _pack(step: LoadedStep) -> tuple[Callable[[_Arrays, BatchCounts, int | None], LoadedStep], _Packed]:
    return _unpack, ([[t.numpy() for t in _tensors(batch)] for batch in step], step.counts, step.number)


def _unpack(arrays: _Arrays, counts: BatchCounts, number: int | None) -> LoadedStep:
    return LoadedStep(tuple(_batch(map(torch.from_numpy, columns)) for columns in arrays), counts, number)


# torch would send every tensor as a file descriptor: hundreds per step at micro-batch size 1, thousands with
# prefetching, where many systems allow 1024. A step is a few megabytes at most; its bytes go through the pipe.
ForkingPickler.register(LoadedStep, _pack)


class StepDataset(Dataset[StepBatch]):
    """Maps a step number (from 0, across epochs) to this rank's share of that step's global batch.

    Only batches of training (``numbered``) say which step they are for.
    """

    def __init__(
        self, store: TokenStore, sampler: GlobalBatchSampler, layout: BatchLayout, *, numbered: bool = False
    ) -> None:
        self.store, self.sampler, self.layout, self._numbered = store, sampler, layout, numbered

    def __getitem__(self, step: int) -> StepBatch:
        batch = collate_step(self.store, self.sampler.batch_indices(step), self.layout)
        return LoadedStep(batch.micro_batches, batch.counts, step if self._numbered else None)


class StepSampler(Sampler[int]):
    """Step numbers from ``start_step`` to ``total_steps``. The length is that of the whole run.

    Lightning compares the steps it has done since the very beginning with the loader's length: a loader that is
    shortened on resuming makes it stop early. ``start_step`` may be set until the first iteration, and holds for that
    one only; later iterations (validations, for instance) begin at 0.
    """

    def __init__(self, total_steps: int, start_step: int = 0) -> None:
        self.total_steps, self.start_step = total_steps, start_step

    def __len__(self) -> int:
        return self.total_steps

    def __iter__(self) -> Iterator[int]:
        # Runs at the first next(): torch asks for an iterator twice before it uses one.
        first, self.start_step = self.start_step, 0
        yield from range(first, self.total_steps)


class StepLoader(DataLoader[StepBatch]):
    """A torch loader of whole steps. Says once if samples lack a partner; order and content ignore ``num_workers``.

    Steps are built in windows of ``lookahead``, and handed out one by one. The first of a window brings the others as
    its ``upcoming``. Windows begin where the iteration does.
    """

    def __init__(self, dataset: StepDataset, steps: StepSampler, num_workers: int, lookahead: int = 1) -> None:
        self._warns_of_lonely = dataset.layout.needs_kl and dataset.layout.dp_rank == 0
        self._num_steps = len(steps)
        super().__init__(
            dataset,
            sampler=steps,
            batch_size=lookahead,
            collate_fn=list,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            multiprocessing_context=_worker_context() if num_workers else None,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            # Else every iteration would draw a seed from the generator that dropout uses.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        """Steps, not windows."""
        return self._num_steps

    def __iter__(self) -> Any:
        """Iterate over steps (torch declares a private iterator type here; Lightning only iterates)."""
        return self._watched(_one_by_one(super().__iter__()))

    def _watched(self, steps: Iterator[StepBatch]) -> Iterator[StepBatch]:
        for step in steps:
            lonely = step.counts.num_samples - step.counts.num_kl_pairs
            if lonely and self._warns_of_lonely:
                self._warns_of_lonely = False
                logger.warning(
                    "%d of %d samples of a global batch have no partner (every other sample has the same prompt or "
                    "response) and do not count in the KL estimate; a larger model.global_batch_size, shuffling, or "
                    "more varied data helps. Said once.",
                    lonely,
                    step.counts.num_samples,
                )
            yield step


def _one_by_one(windows: Iterator[list[StepBatch]]) -> Iterator[StepBatch]:
    for first, *upcoming in windows:
        yield replace(first, upcoming=tuple(upcoming))
        yield from upcoming


def _worker_context() -> Any:
    """A clean process that imports torch once and forks the workers.

    A fork of the training process itself would copy whatever state the locks of its CUDA, NCCL and gloo threads are
    in; ``spawn`` would import torch once per worker.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with interrupts.shielded():
        forkserver.ensure_running()
    return context


def _start_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    threading.Thread(target=_leave_when_told, daemon=True).start()


def _leave_when_told() -> None:
    """End this worker on SIGTERM of the training process, and of no other.

    The fork server was started shielded, so the signal is blocked here: a launcher that tells a whole process group to
    stop would otherwise take away the batches of the steps up to the checkpoint.
    """
    parent = multiprocessing.parent_process()
    while parent is not None:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent.pid:
            os._exit(1)


def _leave_with_parent() -> None:
    """End this worker when the training process has died, killed perhaps.

    torch's workers watch the process that forked them. Here that is the fork server, which itself waits for the last
    worker: without this thread they would keep each other alive for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def warn_of_imbalance(summary: StoreSummary, kto: KTOConfig) -> None:
    """Log what is wrong with the balance of classes and weights in the training data, if anything."""
    # apo_zero_unpaired is a mean over the batch whatever the key says.
    normalization = "per_batch" if kto.loss_type == "apo_zero_unpaired" else kto.loss_normalization
    warning = class_balance_warning(
        summary.num_desirable,
        summary.num_undesirable,
        kto.desirable_loss_weight,
        kto.undesirable_loss_weight,
        normalization,
    )
    if warning:
        logger.warning("%s", warning)


def train_loader(
    store: TokenStore,
    sampler: GlobalBatchSampler,
    layout: BatchLayout,
    *,
    total_steps: int,
    start_step: int = 0,
    num_workers: int = 0,
    lookahead: int = 1,
) -> StepLoader:
    """A loader over steps ``start_step`` .. ``total_steps`` - 1 of the whole run; its length is ``total_steps``.

    Every ``lookahead``-th batch brings the steps up to the next such one.
    """
    dataset = StepDataset(store, sampler, layout, numbered=True)
    return StepLoader(dataset, StepSampler(total_steps, start_step), num_workers, lookahead)


def validation_loader(
    store: TokenStore, sampler: GlobalBatchSampler, layout: BatchLayout, *, num_workers: int = 0
) -> StepLoader:
    """A loader over one epoch of ``sampler`` (made with ``drop_last=False``), the same one every time."""
    return StepLoader(StepDataset(store, sampler, layout), StepSampler(sampler.steps_per_epoch), num_workers)
