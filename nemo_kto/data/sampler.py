"""Which rows make up which global batch: a pure function of (seed, step). Not for sharding or reading rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kto.errors import DataError

IntArray = NDArray[np.int64]


def epoch_order(num_samples: int, seed: int, epoch: int) -> IntArray:
    """[num_samples] int64: a permutation that depends on (seed, epoch) alone.

    Philox is a counter-based generator whose raw stream numpy promises to keep, on every platform and in every
    version; ``Generator.permutation`` comes without that promise. Sorting random keys needs only the raw stream.
    """
    philox = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64))
    order: IntArray = np.argsort(philox.random_raw(num_samples), kind="stable").astype(np.int64)
    return order


class GlobalBatchSampler:
    """Cuts every epoch into global batches of row numbers.

    Training (``drop_last``) leaves out the rows of an epoch that fill no batch, others in every epoch when shuffled.
    Validation keeps them: its last batch is smaller.

    Attributes:
        num_samples: rows of the data set.
        global_batch_size: samples per optimizer step, over all ranks.
        steps_per_epoch: global batches per epoch, after ``limit_batches``.
        dropped_per_epoch: rows that fill no global batch; 0 where the remainder is kept.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool = True,
        limit_batches: int | float = 1.0,
    ) -> None:
        """Plan the epochs.

        Args:
            num_samples: rows of the data set, at least 1.
            global_batch_size: samples per optimizer step.
            seed: of the order; unused without ``shuffle``.
            shuffle: a new order every epoch; else file order.
            drop_last: whether an epoch ends with its last full batch (training) or with a smaller one (validation).
            limit_batches: at most so many batches per epoch (int), or this fraction of them (float).

        Raises:
            DataError: if no batch is left.
        """
        self.num_samples, self.global_batch_size = num_samples, global_batch_size
        self._seed, self._shuffle = seed, shuffle
        if drop_last and num_samples < global_batch_size:
            raise DataError(
                f"the training data holds {num_samples} rows, fewer than model.global_batch_size={global_batch_size}, "
                f"so there is not one step; lower model.global_batch_size to at most {num_samples}, or add data"
            )
        self.dropped_per_epoch = num_samples % global_batch_size if drop_last else 0
        batches = num_samples // global_batch_size if drop_last else -(-num_samples // global_batch_size)
        self.steps_per_epoch = _limited(batches, limit_batches)
        self._cached: tuple[int, IntArray] | None = None

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) that ``step`` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def step_at(self, consumed_samples: int) -> int:
        """The step (from 0) that comes next in training when ``consumed_samples`` have been trained on.

        Raises:
            DataError: if they are no whole number of global batches, because a resumed run had another batch size.
        """
        if consumed_samples % self.global_batch_size:
            raise DataError(
                f"{consumed_samples} samples have been consumed, no multiple of model.global_batch_size="
                f"{self.global_batch_size}; resume with the global batch size that the run was started with"
            )
        return consumed_samples // self.global_batch_size

    @property
    def first_order(self) -> IntArray:
        """[num_samples] int64: all rows in the order of the first epoch, those that fill no batch last."""
        return self._order(0) if self._shuffle else np.arange(self.num_samples, dtype=np.int64)

    def batch_indices(self, step: int) -> IntArray:
        """[N] int64: rows of global batch ``step`` (from 0, across epochs) in global order, equal on every rank."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        stop = min(start + self.global_batch_size, self.num_samples)
        if not self._shuffle:
            return np.arange(start, stop, dtype=np.int64)
        return self._order(epoch)[start:stop]

    def _order(self, epoch: int) -> IntArray:
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, epoch_order(self.num_samples, self._seed, epoch))
        return self._cached[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}  # a worker computes the order faster than it receives it


def _limited(batches: int, limit: int | float) -> int:
    """``batches`` cut to a number (int) or a fraction (float) of them; 0 only if that was asked for."""
    allowed = min(batches, limit) if isinstance(limit, int) else int(batches * min(limit, 1.0))
    if allowed < 1 and limit != 0:
        raise DataError(
            f"{limit} of {batches} global batches is less than one; raise limit_train_batches or limit_val_batches, "
            "or lower model.global_batch_size"
        )
    return allowed
