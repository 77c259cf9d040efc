"""A thin Lightning strategy: process groups, gradients, optimizer sharding and checkpoints all belong to Megatron."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from nemo.utils.app_state import AppState

from nemo_kto import launch
from nemo_kto.checkpoint import dist as dist_checkpoint
from nemo_kto.checkpoint import random_state
from nemo_kto.checkpoint.recovery import whole_checkpoint
from nemo_kto.checkpoint.saving import CheckpointWriter
from nemo_kto.config.world import World
from nemo_kto.distributed import groups as parallel
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.distributed.join import DEFAULT_TIMEOUTS, Timeouts, join
from nemo_kto.training.environment import LaunchedEnvironment
from nemo_kto.training.optim import LightningMegatronOptimizer, prime_state, restate

logger = logging.getLogger(__name__)


class MegatronStrategy(DDPStrategy):
    """Lightning starts and steps; everything distributed is Megatron's. No torch DDP, no broadcast of rank 0's shard.

    Args:
        tensor_parallel: TP size.
        pipeline_parallel: PP size; the rest of the world is data parallel.
        seed: of Megatron's random streams.
        world: this process among all of the job.
        asynchronous_save: whether checkpoints are written beside the training.
        timeouts: how long to wait for the other ranks.
    """

    def __init__(
        self,
        tensor_parallel: int,
        pipeline_parallel: int,
        seed: int,
        world: World,
        *,
        asynchronous_save: bool = False,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ) -> None:
        super().__init__(timeout=timeouts.collective, cluster_environment=LaunchedEnvironment(world))
        self._world = world
        self._timeouts = timeouts
        self._sizes = (tensor_parallel, pipeline_parallel)
        self._seed = seed
        self._groups: ParallelGroups | None = None
        self._random_streams: random_state.Streams | None = None
        self.writer = CheckpointWriter(asynchronous=asynchronous_save)
        """Writes this run's checkpoints."""

    @property
    def groups(self) -> ParallelGroups:
        """This rank's parallel groups; they exist once Lightning has set up the environment."""
        if self._groups is None:
            raise RuntimeError("the strategy has not set up its process groups yet")
        return self._groups

    @property
    def root_device(self) -> torch.device:
        """This rank's device: of several visible ones that of its place on the node, else the one it is shown."""
        devices = self.parallel_devices
        assert devices
        return devices[self.local_rank % len(devices)]

    def setup_distributed(self) -> None:
        """Join the job, lay out Megatron's groups, seed its random streams."""
        join(self._world, "nccl" if self.root_device.type == "cuda" else "gloo", self._timeouts)
        super().setup_distributed()  # finds the job joined, and joins no other
        self._groups = parallel.initialize(*self._sizes, self.root_device, self._timeouts.collective)
        launch.seed_megatron(self._seed)
        app = AppState()  # NeMo's loggers and save/restore read the layout here
        app.tensor_model_parallel_size, app.pipeline_model_parallel_size = self._sizes
        app.model_parallel_size = self._groups.tp_size * self._groups.pp_size
        app.tensor_model_parallel_rank, app.pipeline_model_parallel_rank = self._groups.tp_rank, self._groups.pp_rank
        app.data_parallel_rank, app.data_parallel_size = self._groups.dp_rank, self._groups.dp_size

    def setup(self, trainer: Trainer) -> None:
        """Build the optimizer where the run trains. The model is on its device already."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def configure_ddp(self) -> None:
        """Nothing: the model is wrapped in Megatron's DDP when it is built."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Loading needs the optimizer to exist."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: weights are saved sharded."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Empty: optimizer state is saved sharded."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        """Write Lightning's loop state, and Megatron's weights and optimizer state, as one distributed checkpoint.

        Raises:
            CheckpointError: on every rank: it cannot be written.
        """
        model = self._kto_model
        contents = replace(
            model.policy.contents,
            optimizer=self._megatron_optimizer.megatron,
            common={key: _plain(checkpoint[key]) for key in _LOOP_STATE},
            documents=model.documents(),
            random_streams=True,
        )
        self.writer.save(model.chunks, contents, filepath, self.groups)

    def load_checkpoint(self, checkpoint_path: _PATH, load_optimizer_states: bool = True) -> dict[str, Any]:
        """Load weights and optimizer state in place, and return Lightning's loop state.

        A damaged checkpoint of this run's own directory is set aside, and the newest whole one is loaded instead.

        Raises:
            CheckpointError: none is whole, or it does not fit this run.
        """
        optimizer, model = self._megatron_optimizer.megatron, self._kto_model
        path = whole_checkpoint(Path(checkpoint_path), model.log_dir)
        prime_state(optimizer)
        common = dist_checkpoint.load(model.chunks, optimizer, path, self.groups, model.policy.contents.part)
        restate(optimizer, model.run.model.optim)
        self._random_streams = random_state.read(path, self.groups)
        # not global_step: the batch size may have changed
        step = common["consumed_samples"] // model.run.model.global_batch_size
        if self.is_global_zero:
            logger.info("resuming from %s, step %d", path, step)
            if self._random_streams is None:
                logger.info("it was saved by another layout: random streams (dropout) begin anew")
        _resume_after(step, common["loops"]["fit_loop"])
        return {
            **common,
            "epoch": 0,
            "global_step": step,
            "state_dict": {},
            "optimizer_states": [],
            "lr_schedulers": [],
        }

    def restore_random_streams(self) -> None:
        """Put the generators where the checkpoint has them; the last thing before training goes on."""
        if self._random_streams is not None:
            random_state.restore(self._random_streams)
            self._random_streams = None

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: :meth:`load_checkpoint` has filled the live parameters."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: :meth:`load_checkpoint` has filled the live optimizer."""

    def remove_checkpoint(self, filepath: _PATH) -> None:
        """Delete a checkpoint directory, on one rank."""
        if self.is_global_zero:
            shutil.rmtree(filepath, ignore_errors=True)

    @property
    def _kto_model(self) -> Any:
        module: LightningModule | None = self.lightning_module
        assert module is not None
        return module

    @property
    def _megatron_optimizer(self) -> LightningMegatronOptimizer:
        optimizer = self.optimizers[0]
        assert isinstance(optimizer, LightningMegatronOptimizer)
        return optimizer


_LOOP_STATE = (
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "loops",
    "callbacks",
    "consumed_samples",
    "global_batch_size",
    "skipped_steps",
    "consecutive_skips",
)
"""What of Lightning's checkpoint goes along; hyper-parameters do not: the run's config is the user's to give."""


def _resume_after(step: int, fit_loop: dict[str, Any]) -> None:
    """Put Lightning's counters where ``step`` completed steps leave them, in the run's one epoch.

    As saved they depend on the hook that saved: a checkpoint written after a batch counts that batch as unfinished, so
    that validations would come a step late, and one written at the end of a run marks the epoch as over, so that a run
    given more steps would end at once.
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    updates = fit_loop["epoch_loop.manual_optimization.optim_step_progress"]  # where global_step comes from
    for counters in (batches["current"], batches["total"], updates["current"], updates["total"]):
        counters.update(dict.fromkeys(counters, step))
    batches["is_last_batch"] = False
    for counters in (fit_loop["epoch_progress"]["current"], fit_loop["epoch_progress"]["total"]):
        counters.update(dict.fromkeys(counters, 0))


def _plain(value: Any) -> Any:
    """Containers, numbers and strings only: Megatron reads them back without unpickling objects."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor)):
        return value
    raise TypeError(f"checkpoint state holds a {type(value).__name__}, which cannot be read back safely")
