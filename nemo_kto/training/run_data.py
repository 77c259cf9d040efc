"""The data of one run: stores, orders and how many steps they give. Reads no file and builds no batch itself."""

from __future__ import annotations

from dataclasses import replace

from torch.utils.data import DataLoader

from nemo_kto.config.architecture import Architecture
from nemo_kto.config.identity import identity
from nemo_kto.config.schema import Config
from nemo_kto.data.batch import StepBatch
from nemo_kto.data.collate import BatchLayout
from nemo_kto.data.datamodule import train_loader, validation_loader
from nemo_kto.data.fixed_pairs import fixed_partners
from nemo_kto.data.places import RecordPlaces
from nemo_kto.data.sampler import GlobalBatchSampler
from nemo_kto.data.store import TokenStore
from nemo_kto.objective.counts import BatchCounts


class RunData:
    """Train and validation data, in this run's order.

    Args:
        config: the run.
        train: training rows.
        validation: held-out rows, or None.
        network: what is trained.

    Attributes:
        steps_per_epoch: optimizer steps per pass over the training data, after ``limit_train_batches``.
        total_steps: optimizer steps of the run: the smaller of ``max_steps`` and ``max_epochs`` gives.
        val_interval: optimizer steps between validations.
        validation_counts: rows by class of the whole validation set, without pairs and tokens.
        identity: what must not change when the run is resumed; empty where the training rows come without their files.
        train_summary: what the training data holds and what was left out of it.
        validation_summary: the same of the validation data, or None.
    """

    def __init__(
        self, config: Config, train: TokenStore, validation: TokenStore | None, network: Architecture
    ) -> None:
        loop, model = config.trainer.kto, config.model
        self._config, self._train_store, self._validation_store = config, train, validation
        self.identity = {} if train.digests is None else identity(config, train.digests, network)
        self._places = RecordPlaces(model.data.data_prefix.train)
        self.train_summary = train.summary
        self.validation_summary = None if validation is None else validation.summary
        self.train_sampler = GlobalBatchSampler(
            len(train),
            model.global_batch_size,
            seed=model.seed,
            shuffle=model.data.shuffle,
            limit_batches=loop.limit_train_batches,
        )
        self._partners = fixed_partners(train, self.train_sampler.first_order) if model.kto.fixed_pairs else None
        self.steps_per_epoch = self.train_sampler.steps_per_epoch
        by_epochs = self.steps_per_epoch * loop.max_epochs
        self.total_steps = by_epochs if loop.max_steps == -1 else min(by_epochs, loop.max_steps)
        interval = loop.val_check_interval
        self.val_interval = interval if isinstance(interval, int) else max(1, int(interval * self.steps_per_epoch))
        self.validation_sampler = None
        if validation is not None and loop.limit_val_batches != 0:
            self.validation_sampler = GlobalBatchSampler(
                len(validation),
                model.global_batch_size,
                seed=0,
                shuffle=False,
                drop_last=False,
                limit_batches=loop.limit_val_batches,
            )
        self.validation_counts = self._count_validation()

    def epoch(self, consumed_samples: int) -> float:
        """Passes over the (limited) training data that ``consumed_samples`` make."""
        return consumed_samples / (self.steps_per_epoch * self._config.model.global_batch_size)

    def train_loader(self, consumed_samples: int, *, dp_rank: int, dp_size: int) -> DataLoader[StepBatch]:
        """Global batches of the whole run, starting after ``consumed_samples``."""
        return train_loader(
            self._train_store,
            self.train_sampler,
            replace(self._layout(dp_rank, dp_size), fixed_partners=self._partners),
            total_steps=self.total_steps,
            start_step=self.train_sampler.step_at(consumed_samples),
            num_workers=self._config.model.data.num_workers,
            lookahead=self._config.model.kto.reference_lookahead,
        )

    def validation_loader(self, *, dp_rank: int, dp_size: int) -> DataLoader[StepBatch] | None:
        """The validation batches, or None where the run has none."""
        if self._validation_store is None or self.validation_sampler is None:
            return None
        workers = self._config.model.data.num_workers
        layout = self._layout(dp_rank, dp_size)
        return validation_loader(self._validation_store, self.validation_sampler, layout, num_workers=workers)

    def records_before(self, consumed_samples: int) -> list[str]:
        """Places of the records of the global batch, all ranks' share, that brought it to ``consumed_samples``."""
        batch = self.train_sampler.batch_indices(self.train_sampler.step_at(consumed_samples) - 1)
        return self._places.where(self._train_store.record_index[batch].tolist())

    def _layout(self, dp_rank: int, dp_size: int) -> BatchLayout:
        model = self._config.model
        return BatchLayout(
            dp_rank=dp_rank,
            dp_size=dp_size,
            micro_batch_size=model.micro_batch_size,
            pad_id=0,
            seq_length=model.data.seq_length,
            pad_multiple=model.tensor_model_parallel_size if model.sequence_parallel else 1,
            needs_kl=model.kto.loss_type != "apo_zero_unpaired",
            packing=model.data.packing,
            stages=model.pipeline_model_parallel_size,
        )

    def _count_validation(self) -> BatchCounts:
        """Rows by class of the whole (limited) validation set: the denominators of the pooled loss."""
        rows: list[int] = []
        if self._validation_store is not None and self.validation_sampler is not None:
            for step in range(self.validation_sampler.steps_per_epoch):
                rows.extend(self.validation_sampler.batch_indices(step).tolist())
        desirable = int(self._validation_store.desirable[rows].sum()) if self._validation_store is not None else 0
        return BatchCounts(len(rows), desirable, len(rows) - desirable, num_kl_pairs=0, num_tokens=0)
