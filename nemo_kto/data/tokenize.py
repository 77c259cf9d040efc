"""Records to a token store, by as many processes as pay off, at most once per data set. Not for single texts."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

from nemo_kto import interrupts
from nemo_kto.config.schema import DataConfig
from nemo_kto.data.cache import cache_root, digest_files, fingerprint, open_or_build
from nemo_kto.data.encode import Encoder, EncodeSettings, load_tokenizer
from nemo_kto.data.problems import Problems
from nemo_kto.data.readers import usable_files
from nemo_kto.data.records import Record, iter_records
from nemo_kto.data.store import RowChunk, StoreSummary, StoreWriter, TokenStore
from nemo_kto.errors import CheckpointError, DataError, StoppedEarlyError

__all__ = ["EncodeSettings", "StoreSummary", "TokenStore", "build_store", "load_tokenizer"]

MAX_WORKERS = 16
CHUNK = 512  # records per unit of work
BYTES_PER_WORKER = 8 << 20  # of input: less than this takes less time than a process takes to start (4 s)

logger = logging.getLogger(__name__)


def build_store(files: Sequence[str | Path], tokenizer_path: str | Path, data_config: DataConfig) -> TokenStore:
    """Tokenise ``files`` with the tokenizer in ``tokenizer_path``, or open what an earlier call left in the cache.

    Safe to call on all ranks at once: one builds, the others wait for it.

    Raises:
        DataError: if a file, a record or the cache directory is bad, or no row is left.
        CheckpointError: if there is no tokenizer, or it has no EOS token to append.
        StoppedEarlyError: if a signal came that is to be heeded.
    """
    problems = Problems("the data cannot be used; problems")
    names = usable_files(files, problems)
    problems.raise_if_any()
    if not Path(tokenizer_path).is_dir():
        raise CheckpointError(f"{tokenizer_path} is not a directory; want one that holds the model's tokenizer")
    settings = EncodeSettings(data_config.seq_length, data_config.append_eos, data_config.overlong)
    workers = _num_workers(names, data_config.tokenize_workers)

    def build(out: Path) -> None:
        _write(out, names, _Work(tokenizer_path, settings, workers))

    digests = digest_files(names, tokenizer_path)
    store = open_or_build(cache_root(data_config.cache_dir), fingerprint(digests, settings), build)
    store.digests = digests
    return store


class _Work:
    """How to encode, here or in other processes."""

    def __init__(self, tokenizer_path: str | Path, settings: EncodeSettings, workers: int) -> None:
        self.encoder_arguments = (tokenizer_path, settings)
        self.workers = workers

    def encode(self, records: Iterable[Record]) -> Iterator[RowChunk]:
        """The rows of ``records``, in order."""
        chunks = _numbered_chunks(records)
        if self.workers > 1:
            yield from self._encode_in_pool(chunks)
            return
        encoder = Encoder(*self.encoder_arguments)
        for first, chunk in chunks:
            yield encoder.encode(chunk, first)

    def _encode_in_pool(self, chunks: Iterator[tuple[int, list[Record]]]) -> Iterator[RowChunk]:
        Encoder(*self.encoder_arguments)  # what is wrong with the tokenizer is said here, where it can be caught
        # Never fork: by now the process may hold CUDA, NCCL or gloo threads and the tokenizer's own pool, whose locks
        # a forked child would inherit in whatever state they are.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.workers, context, _start_worker, self.encoder_arguments)
        pending: deque[Future[RowChunk]] = deque()
        try:
            for first, chunk in chunks:
                with interrupts.shielded():  # submitting starts the processes
                    pending.append(pool.submit(_encode_in_worker, chunk, first))
                if len(pending) > 2 * self.workers:  # bounds the records in memory
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenising process died; its own message is above. If memory ran out, lower "
                f"model.data.tokenize_workers (now {self.workers}; 1 starts no process). If the script has no "
                'if __name__ == "__main__" guard, give it one'
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_worker_encoder: Encoder | None = None


def _start_worker(tokenizer_path: str | Path, settings: EncodeSettings) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process: the processes are the parallelism
    _worker_encoder = Encoder(tokenizer_path, settings)


def _encode_in_worker(chunk: list[Record], first: int) -> RowChunk:
    assert _worker_encoder is not None
    return _worker_encoder.encode(chunk, first)


def _numbered_chunks(records: Iterable[Record]) -> Iterator[tuple[int, list[Record]]]:
    iterator, first = iter(records), 0
    while chunk := list(islice(iterator, CHUNK)):
        yield first, chunk
        first += len(chunk)


def _num_workers(files: Sequence[str], asked: int | None) -> int:
    cores = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
    useful = sum(os.path.getsize(file) for file in files) // BYTES_PER_WORKER
    return max(1, min(cores if asked is None else asked, useful))


def _write(out: Path, files: Sequence[str], work: _Work) -> None:
    for number, _ in enumerate(iter_records(files)):
        # a bad last line is worth knowing before the tokenizer is loaded and hours of tokens are made
        if number % CHUNK == 0:
            _heed()
    problems = Problems("the data cannot be tokenised; problems")
    num_rows = num_records = 0
    with StoreWriter(out) as writer:
        for chunk in work.encode(iter_records(files)):
            _heed()
            for where, what in chunk.problems:
                problems.add(where, what)
            writer.add(chunk)
            num_rows, num_records = num_rows + chunk.lengths.size, num_records + chunk.num_records
        problems.raise_if_any()
        if not num_rows:
            raise DataError(
                f"all {num_records} records of {', '.join(files)} are longer than "
                f"model.data.seq_length={work.encoder_arguments[1].seq_length} tokens and were dropped; raise it"
            )
        logger.info("tokenised: %s", writer.finish(files).describe())


def _heed() -> None:
    name = interrupts.requested()
    if name is not None:
        raise StoppedEarlyError(f"stopped by {name} while the data was tokenised; the same command starts again")
