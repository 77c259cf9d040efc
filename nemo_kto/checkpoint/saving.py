"""Writes checkpoints that are whole or absent, at once or while training goes on. Reads none."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from nemo_kto import interrupts
from nemo_kto.checkpoint import random_state
from nemo_kto.checkpoint.hf_export import copy_companions
from nemo_kto.checkpoint.sharded import Part, sharded_state
from nemo_kto.checkpoint.together import on_all_ranks, on_first_rank
from nemo_kto.config import manifest
from nemo_kto.config.locate import HF_SUBDIR
from nemo_kto.config.manifest import FileRecord
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.errors import CheckpointError
from nemo_kto.gpt.live import parameters_settled, require_policy

logger = logging.getLogger(__name__)

_DIGESTS = ".digests-"
_COMMON_FILE = "common.pt"  # Megatron's name
_BACKEND = ("torch_dist", 1)
ESSENTIAL = (_COMMON_FILE, "metadata.json", ".metadata")
"""Files that every checkpoint holds besides its shards."""


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint besides weights.

    Attributes:
        hf_source: directory whose config and tokenizer go along.
        optimizer: Megatron's optimizer; None for weights alone.
        common: state that is equal on all ranks: plain numbers, strings, lists, dicts and tensors.
        documents: small text files by name.
        random_streams: whether the random streams of all ranks go along.
        part: the network's weights, or its adapters alone.
    """

    hf_source: Path
    optimizer: MegatronOptimizer | None = None
    common: Mapping[str, Any] = field(default_factory=dict)
    documents: Mapping[str, str] = field(default_factory=dict)
    random_streams: bool = False
    part: Part = Part.NETWORK


class CheckpointWriter:
    """Writes one checkpoint after the other. All ranks of the job call every method together.

    A checkpoint is written to ``NAME.partial``, forced to the disk, given a manifest of checksums, and renamed. So it
    exists whole or not at all, whenever the job or the machine dies.

    Args:
        asynchronous: write in a process of its own while training goes on; otherwise :meth:`save` does all of it.
    """

    def __init__(self, *, asynchronous: bool = False) -> None:
        self._asynchronous = asynchronous
        self._queue = AsyncCallsQueue()
        self._pending: Path | None = None

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint has been begun and is not there yet."""
        return self._pending is not None

    def save(
        self, chunks: Sequence[nn.Module], contents: Contents, out_dir: str | Path, groups: ParallelGroups
    ) -> None:
        """Write a checkpoint, or begin to. One that is still being written is finished first.

        Args:
            chunks: model chunks of this rank.
            contents: what goes along.
            out_dir: the checkpoint; must not exist, on a file system that all ranks share.
            groups: the layout.

        Raises:
            CheckpointError: on every rank: it cannot be written. Nothing is left under ``out_dir``.
        """
        require_policy(chunks, "saving a checkpoint")
        self.finish()
        target = Path(out_dir)
        draft = target.with_name(f"{target.name}.partial")
        on_first_rank(lambda: _make_empty(target, draft), f"{draft} cannot be created")
        self._pending = target
        try:
            with parameters_settled(chunks):
                request = _request(chunks, contents, draft, target, groups)
                if self._asynchronous:
                    self._queue.schedule_async_request(request)
                else:
                    on_all_ranks(request.execute_sync, f"{draft} cannot be written")
        except CheckpointError:
            self._give_up(draft)
            raise
        if not self._asynchronous:
            self._pending = None

    def finish(self, *, wait: bool = True) -> Path | None:
        """Publish a checkpoint that was begun, once all ranks have written theirs.

        Args:
            wait: until it is written; otherwise nothing happens while it is not.

        Returns:
            The checkpoint, if this call published one.

        Raises:
            CheckpointError: on every rank: it could not be written. The training can go on.
        """
        target = self._pending
        if target is None or not self._asynchronous:
            return None
        draft = target.with_name(f"{target.name}.partial")
        try:
            done = on_all_ranks(
                partial(self._queue.maybe_finalize_async_calls, blocking=wait), f"{draft} cannot be written"
            )
        except CheckpointError:
            self._give_up(draft)
            raise
        if not done:
            return None
        self._pending = None
        return target

    def _give_up(self, draft: Path) -> None:
        """Leave no half checkpoint: it would fill the disk that may be full already."""
        self._pending = None
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)


class _TorchDist(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's ``torch_dist`` writer, whose end all ranks agree on.

    Upstream, a coordinator that cannot write the index raises alone while its peers wait for it.
    """

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        # A private name of Megatron 0.16 (hence the upper bound in pyproject.toml).
        save_fn, preload_fn, arguments = writer.get_save_function_and_args()
        storage, index, _ = planned

        def finalize() -> None:
            results: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(results, storage.retrieve_write_results())
            # torch wraps an exception and its stack in a tuple; results are lists
            failed = next((result[0] for result in results if isinstance(result, tuple)), None)
            if failed is not None:
                raise CheckpointError(f"{writer.path} cannot be written: {failed}")
            on_first_rank(lambda: storage.finish(index, results), f"{writer.path} cannot be written")

        return AsyncRequest(save_fn, arguments, [finalize], preload_fn=preload_fn)


def _request(
    chunks: Sequence[nn.Module], contents: Contents, draft: Path, target: Path, groups: ParallelGroups
) -> AsyncRequest:
    """Everything up to the point where only bytes of tensors are left to write, and what follows after that."""
    weights = sharded_state(chunks, contents.optimizer, groups, part=contents.part, is_loading=False)
    state = {**weights, "common": dict(contents.common)}
    sharded, common = save_preprocess(state, True, None)
    streams = random_state.gather(groups) if contents.random_streams else None
    on_first_rank(partial(_write_small, draft, common, contents, streams), f"{draft} cannot be written")
    with interrupts.shielded():  # Megatron starts a process for the results of all its writers
        request = _TorchDist(*_BACKEND).async_save(sharded, draft)
    request.finalize_fns.append(
        lambda: on_first_rank(partial(_publish, draft, target), f"{target} cannot be completed")
    )
    if request.async_fn is None:
        return request
    return request._replace(async_fn=partial(_write_and_settle, request.async_fn, draft, os.getpid()))


def _write_and_settle(
    write: Callable[..., None], draft: Path, trainer: int, rank: int, buckets: Any, queue: Any
) -> None:
    """Write this rank's files, force them to the disk, and leave their checksums behind.

    The checksums are taken here, so that a large checkpoint is hashed by all ranks at once and beside the training.
    """
    if os.getpid() != trainer:
        # a scheduler signals all processes of a step; this one ends by itself, and soon
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    try:
        write(rank, buckets, queue)
        records = {Path(bucket[0]).name: asdict(manifest.settle(Path(bucket[0]))) for bucket in buckets}
        manifest.write_text(draft / f"{_DIGESTS}{rank:06d}.json", json.dumps(records))
    except Exception as error:
        # not raised: the peers wait at a barrier. A file that is missing is noticed when the results are collected
        logger.debug("rank %d: %s", rank, error)


def _write_small(draft: Path, common: dict[str, Any], contents: Contents, streams: dict[str, Tensor] | None) -> None:
    torch.save(common, draft / _COMMON_FILE)
    save_config(CheckpointingConfig(*_BACKEND), str(draft))
    if streams is not None:
        random_state.write(streams, draft)
    for name, text in contents.documents.items():
        (draft / name).write_text(text, encoding="utf-8")
    (draft / HF_SUBDIR).mkdir()
    shutil.copy2(contents.hf_source / "config.json", draft / HF_SUBDIR)
    copy_companions(contents.hf_source, draft / HF_SUBDIR)


def _make_empty(target: Path, draft: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target} exists: remove it or choose another directory")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)


def _publish(draft: Path, target: Path) -> None:
    began = time.monotonic()
    known: dict[str, FileRecord] = {}
    for file in draft.glob(f"{_DIGESTS}*.json"):
        known |= {name: FileRecord(**record) for name, record in json.loads(file.read_text()).items()}
        file.unlink()
    lost = [name for name in (*ESSENTIAL, *known) if not (draft / name).is_file()]
    if lost:
        raise CheckpointError(f"{draft} has lost {', '.join(lost[:3])}: does another run write here?")
    manifest.complete(draft, known)
    draft.rename(target)
    manifest.sync_directory(target.parent)
    logger.debug("%s completed in %.2f s", target, time.monotonic() - began)
