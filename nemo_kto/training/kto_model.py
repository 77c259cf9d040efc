"""The NeMo model: wires network, reference, objective, optimizer and data into Lightning's hooks. No arithmetic."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from nemo.core.classes import ModelPT
from torch import nn
from torch.utils.data import DataLoader

from nemo_kto.config.load import to_container, to_yaml
from nemo_kto.config.locate import hf_side
from nemo_kto.config.resume import RECORD
from nemo_kto.config.schema import Config
from nemo_kto.data.batch import StepBatch
from nemo_kto.errors import CheckpointError
from nemo_kto.training.metrics import SUMS, Metrics, MetricsFile, named_means, peak_memory_bytes
from nemo_kto.training.nemo_connector import MegatronKTOConnector
from nemo_kto.training.optim import (
    LightningMegatronOptimizer,
    build_optimizer,
    float32_masters,
    set_learning_rate,
)
from nemo_kto.training.policy import Policy, PolicyBuilder
from nemo_kto.training.run_data import RunData
from nemo_kto.training.schedule import learning_rate
from nemo_kto.training.skipped import SkippedSteps
from nemo_kto.training.step import KTOStep, loss_settings, score_size


class MegatronGPTKTOModel(ModelPT):
    """A Megatron GPT that is trained with KTO by a Lightning trainer.

    The network is built when Lightning asks for it (:meth:`configure_model`), because process groups exist only then.
    Gradients, clipping and sharding belong to Megatron, so optimization is manual.

    Args:
        run: the whole run's config.
        trainer: a trainer with :class:`~nemo_kto.training.strategy.MegatronStrategy`.
        data: train and validation data at this run's sequence length and batch size.
    """

    def __init__(self, run: Config, trainer: Trainer, data: RunData) -> None:
        super().__init__(cfg=to_container(run).model, trainer=trainer)  # NeMo's own view: the model section
        self.automatic_optimization = False
        self.run = run
        self.data = data
        self.consumed_samples = 0
        self.trained_steps = 0
        self.chunks: Sequence[nn.Module] = ()
        self.log_dir = Path(run.exp_manager.explicit_log_dir)
        self.hf_side = hf_side(run.pretrained_checkpoint.restore_from_path)
        self._settings = loss_settings(run.model.kto)
        self._policy: Policy | None = None
        self._step: KTOStep | None = None
        self._validation_sums: dict[str, float] = {}
        self._validation_pairs = 0
        self._rows_seen = 0
        self._step_started = time.perf_counter()
        self._metrics_file = MetricsFile(self.log_dir / "metrics.jsonl")
        self._save_restore_connector = MegatronKTOConnector()
        self.skips = SkippedSteps(self.log_dir, run.trainer.kto.max_consecutive_skips, data.records_before)

    # -- what ModelPT wants to know

    def setup_training_data(self, train_data_config: Any) -> None:
        """Nothing: the data is given to the constructor."""

    def setup_validation_data(self, val_data_config: Any) -> None:
        """Nothing: the data is given to the constructor."""

    @classmethod
    def list_available_models(cls) -> list[Any]:
        """None: weights come from ``pretrained_checkpoint.restore_from_path``."""
        return []

    @classmethod
    def restore_from(cls, restore_path: str, override_config_path: Config, trainer: Trainer, data: RunData) -> Any:
        """A run that starts from a ``.nemo`` file: :meth:`MegatronKTOConnector.restore_from`."""
        return MegatronKTOConnector(data).restore_from(cls, restore_path, override_config_path, trainer=trainer)

    # -- the network and its reference

    def configure_model(self) -> None:
        """Build the network and its reference, and load what the policy starts from.

        On resume, Lightning loads the policy over it later, so the reference is always the run's own.
        """
        if self._policy is not None:
            return
        groups, fitting = self.trainer.strategy.groups, self.trainer.state.fn == TrainerFn.FITTING
        policy = PolicyBuilder(self.run, groups, fitting=fitting).build()
        self._policy, self.chunks = policy, policy.chunks
        self._step = KTOStep(policy.passes, policy.reference, self._settings, groups, score_size(self.run.model))

    @property
    def policy(self) -> Policy:
        """Network and reference; they exist once Lightning has asked for the network."""
        assert self._policy is not None
        return self._policy

    def configure_optimizers(self) -> LightningMegatronOptimizer:
        """Megatron's optimizer over the wrapped chunks."""
        clip = self.run.trainer.kto.gradient_clip_val
        optimizer = build_optimizer(self.chunks, self.run.model.optim, clip_grad=clip)
        if self.policy.swap is not None:
            self.policy.swap.use_masters(partial(float32_masters, optimizer))
        return LightningMegatronOptimizer(optimizer, self.chunks)

    # -- training

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One optimizer step over one global batch."""
        optimizer = self.optimizers()
        optim = self.run.model.optim
        rate = learning_rate(self.skips.taken(self.trainer.global_step), optim, self.data.total_steps)
        set_learning_rate(optimizer.optimizer.megatron, rate, optim.weight_decay)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        moved = self.policy.bytes_moved
        sums = self.kto_step.train(batch)
        moved = self.policy.bytes_moved - moved
        optimizer.step(loss_is_finite=math.isfinite(sums["loss"]))
        self.consumed_samples += batch.counts.num_samples
        self.trained_steps += 1
        self.skips.count(taken=optimizer.optimizer.succeeded)
        norm, step = optimizer.optimizer.grad_norm, self.trainer.global_step
        means = named_means(sums, batch.counts, self._settings.beta)
        self._report({**means, "reference_bytes": moved, **self._rows_computed()}, batch, rate, norm)
        self.skips.report(step, self.consumed_samples, sums["loss"], norm, writes=self.trainer.is_global_zero)

    def on_train_batch_end(self, *_: Any) -> None:
        """Restart the clock after checkpoints: they are written between steps."""
        self._step_started = time.perf_counter()

    @property
    def kto_step(self) -> KTOStep:
        """The step's arithmetic; exists once the network does."""
        assert self._step is not None
        return self._step

    def on_train_start(self) -> None:
        """Put random streams and metrics.jsonl where the first step expects them, and start its clock."""
        self.trainer.strategy.restore_random_streams()
        if self.trainer.is_global_zero:
            self._metrics_file.go_back_to(self.trainer.global_step)
            self.skips.go_back_to(self.trainer.global_step)
        self._step_started = time.perf_counter()

    def on_train_end(self) -> None:
        """Leave the cache as it can be found."""
        if self.policy.cache is not None:
            self.policy.cache.close()

    def pause(self, seconds: float) -> None:
        """Leave time that was spent on something else out of the step's."""
        self._step_started += seconds

    def _report(self, metrics: Metrics, batch: StepBatch, rate: float, grad_norm: float) -> None:
        now = time.perf_counter()
        seconds, self._step_started = now - self._step_started, now
        record: Metrics = {
            "step": self.trainer.global_step,
            "epoch": self.data.epoch(self.consumed_samples),
            "consumed_samples": self.consumed_samples,
            **metrics,
            "grad_norm": grad_norm,
            "lr": rate,
            "skipped_steps": self.skips.total,
            "step_time_s": seconds,
            "tokens": batch.counts.num_tokens,
            "pad_fraction": batch.counts.pad_fraction,
            "tokens_per_second": batch.counts.num_tokens / seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        self._publish(record)

    def _rows_computed(self) -> Metrics:
        """Rows that the cache did not have since this was last asked, over all ranks; nothing without a cache."""
        if self.policy.cache is None:
            return {}
        before, self._rows_seen = self._rows_seen, self.policy.cache.rows_computed
        return {"reference_rows_computed": self._rows_seen - before}

    def _publish(self, record: Metrics) -> None:
        """To metrics.jsonl, the loggers and the progress bar."""
        if self.trainer.is_global_zero:
            self._metrics_file.write(record)
        values = {key: float(value) for key, value in record.items() if value is not None}
        shown = {key: values.pop(key) for key in ("loss", "kl", "rewards/margins") if key in values}
        self.log_dict(shown, prog_bar=True, batch_size=1, rank_zero_only=True)
        self.log_dict(values, batch_size=1, rank_zero_only=True)

    # -- validation

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of the validation before."""
        self._validation_sums, self._validation_pairs = dict.fromkeys(SUMS, 0.0), 0

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Add one validation batch's sums."""
        sums = self.kto_step.evaluate(batch, self.data.validation_counts)
        for name in SUMS:
            self._validation_sums[name] += sums[name]
        self._validation_pairs += batch.counts.num_kl_pairs

    def on_validation_epoch_end(self) -> None:
        """Means over the whole validation set."""
        counts = replace(self.data.validation_counts, num_kl_pairs=self._validation_pairs)
        means = {**named_means(self._validation_sums, counts, self._settings.beta), **self._rows_computed()}
        record: Metrics = {
            "step": self.trainer.global_step,
            "epoch": self.data.epoch(self.consumed_samples),
            "consumed_samples": self.consumed_samples,
            **{f"val/{key}": value for key, value in means.items()},
        }
        if self.trainer.is_global_zero:
            self._metrics_file.write(record)
        values = {key: float(value) for key, value in record.items() if key.startswith("val/") and value is not None}
        self.log_dict({**values, "val_loss": values["val/loss"]}, batch_size=1, rank_zero_only=True)
        self._step_started = time.perf_counter()

    # -- data and state

    def train_dataloader(self) -> DataLoader[StepBatch]:
        """Global batches from where the completed optimizer steps end."""
        groups = self.trainer.strategy.groups
        return self.data.train_loader(self.consumed_samples, dp_rank=groups.dp_rank, dp_size=groups.dp_size)

    def val_dataloader(self) -> DataLoader[StepBatch] | list[Any]:
        """The validation set, or nothing."""
        groups = self.trainer.strategy.groups
        loader = self.data.validation_loader(dp_rank=groups.dp_rank, dp_size=groups.dp_size)
        return [] if loader is None else loader

    def transfer_batch_to_device(self, batch: StepBatch, device: torch.device, dataloader_idx: int) -> StepBatch:
        """Move every micro-batch's tensors."""
        return batch.to(device)

    def documents(self) -> dict[str, str]:
        """What a checkpoint says about its run, in files that need no torch to be read."""
        groups = self.trainer.strategy.groups
        record = {
            "step": self.trainer.global_step,
            "consumed_samples": self.consumed_samples,
            "global_batch_size": self.run.model.global_batch_size,
            "layout": {"tensor": groups.tp_size, "pipeline": groups.pp_size, "data": groups.dp_size},
            "reference": self.policy.identity,
            "reference_weights": self.policy.reference_weights,
            "identity": self.data.identity,
        }
        own = {RECORD: json.dumps(record, indent=1), "config.yaml": to_yaml(self.run)}
        return {**self.policy.contents.documents, **own}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep where the data stands."""
        checkpoint["consumed_samples"] = self.consumed_samples
        checkpoint["global_batch_size"] = self.run.model.global_batch_size
        if self.policy.cache is not None:
            self.policy.cache.flush()  # a run that goes on from here finds what this one has found
        checkpoint.update(self.skips.state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from where the data stood."""
        there, here = checkpoint["global_batch_size"], self.run.model.global_batch_size
        if there != here and not self.run.exp_manager.resume_with_changes:
            raise CheckpointError(
                f"the run was started with model.global_batch_size={there}, not {here}: resume with it"
            )
        self.consumed_samples = checkpoint["consumed_samples"]
        self.skips.load(checkpoint)
