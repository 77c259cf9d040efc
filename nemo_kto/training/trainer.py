"""Builds the Lightning trainer from config, and runs it. Parses nothing."""

from __future__ import annotations

import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from nemo_kto.checkpoint.retention import Retention
from nemo_kto.config.load import to_yaml
from nemo_kto.config.locate import newest_checkpoint, resume_path
from nemo_kto.config.log_dir import claim, write_config
from nemo_kto.config.schema import Config, ExpManagerConfig, KTOLoopConfig
from nemo_kto.config.world import World
from nemo_kto.distributed.join import Timeouts
from nemo_kto.errors import KTOError
from nemo_kto.training.checkpointing import CheckpointKeeper, StepBoundary
from nemo_kto.training.kto_model import MegatronGPTKTOModel
from nemo_kto.training.loggers import loggers
from nemo_kto.training.profiling import StepProfiler
from nemo_kto.training.progress import progress_callback
from nemo_kto.training.run_data import RunData
from nemo_kto.training.stopping import StopAgreement
from nemo_kto.training.strategy import MegatronStrategy

_WORKER_DIED = re.compile(r"DataLoader worker \(pid.*(killed|exited)")


class _StepLoop(_TrainingEpochLoop):
    """Lightning's loop over steps, without the validation that it repeats before the first step of a resumed run.

    That one was done before the checkpoint was written. NeMo's loop for this purpose also leaves out the validation
    that belongs to the first step after the resume.
    """

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        # A private name of Lightning's, which NeMo overrides too.
        return self.trainer.lightning_module.trained_steps > 0 and super()._should_check_val_fx(data_fetcher)


def fit(config: Config, data: RunData, world: World) -> Path | None:
    """Train, and return the newest checkpoint's directory; None where checkpoints are off.

    Raises:
        ConfigError: another run is in its directory, or that cannot be written.
        StoppedEarlyError: a signal or ``max_time_per_run`` ended the run before its last step; it can be resumed.
        CheckpointError: there is nothing to resume from, it cannot be read, or the last checkpoint cannot be written.
    """
    log_dir = Path(config.exp_manager.explicit_log_dir)
    resume_from = resume_path(config.exp_manager)
    trainer = build_trainer(config, data, world)
    if trainer.is_global_zero:
        claim(log_dir)
        write_config(log_dir, to_yaml(config))
    model = MegatronGPTKTOModel(config, trainer, data)
    try:
        trainer.fit(model, ckpt_path=resume_from)
    except RuntimeError as error:
        if not _WORKER_DIED.search(str(error)):
            raise
        raise KTOError(
            f"a process that builds batches died ({error}): if memory ran out, lower model.data.num_workers (now "
            f"{config.model.data.num_workers}; 0 builds them in the training process). The same command goes on from "
            "the newest checkpoint"
        ) from error
    except SystemExit:
        if trainer.interrupted:  # Lightning exits by itself, with the code of a bug
            raise KeyboardInterrupt from None
        raise
    if resume_from is not None and model.trained_steps == 0 and trainer.is_global_zero:
        sys.stderr.write(f"nothing to train: {resume_from} has all {data.total_steps} steps of this run\n")
    return newest_checkpoint(log_dir) if config.exp_manager.create_checkpoint_callback else None


def build_trainer(config: Config, data: RunData, world: World) -> pl.Trainer:
    """A Lightning trainer that leaves precision, clipping, sampling and synchronisation to Megatron and to us."""
    loop, model, exp = config.trainer.kto, config.model, config.exp_manager
    boundary = StepBoundary(_keeper(exp, loop), StopAgreement(_seconds(exp.max_time_per_run)), data.total_steps)
    trainer = pl.Trainer(
        strategy=MegatronStrategy(
            model.tensor_model_parallel_size,
            model.pipeline_model_parallel_size,
            model.seed,
            world,
            asynchronous_save=exp.checkpoint_callback_params.async_save,
            timeouts=Timeouts(
                timedelta(minutes=config.trainer.join_timeout_minutes),
                timedelta(minutes=config.trainer.distributed_timeout_minutes),
            ),
        ),
        accelerator=config.trainer.accelerator,
        devices=_devices(world),
        num_nodes=world.num_nodes,
        precision="32-true",  # Megatron's own wrapper holds the bf16 weights
        logger=loggers(exp),
        callbacks=[progress_callback(), boundary, *_profiler(exp)],
        enable_checkpointing=False,  # Lightning's own
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,  # Megatron caches its rotary table: one made in inference mode breaks the next backward
        num_sanity_val_steps=0,
        max_steps=data.total_steps,
        max_epochs=1,  # the loader runs over all epochs, so that its position is consumed_samples alone
        val_check_interval=min(data.val_interval, data.total_steps),
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
    )
    trainer.fit_loop.epoch_loop = _StepLoop(trainer, max_steps=data.total_steps)
    return trainer


def _devices(world: World) -> int:
    """Devices that Lightning may take for granted: a launcher may show each process its own GPU only."""
    return min(world.local_size, torch.cuda.device_count()) if torch.cuda.is_available() else world.local_size


def _keeper(exp: ExpManagerConfig, loop: KTOLoopConfig) -> CheckpointKeeper | None:
    if not exp.create_checkpoint_callback:
        return None
    log_dir, params = Path(exp.explicit_log_dir), exp.checkpoint_callback_params
    retention = Retention(log_dir, params.mode, params.save_last_k, params.save_top_k)
    return CheckpointKeeper(log_dir, loop.save_interval, params.monitor, retention, ranks_best=params.save_top_k != 0)


def _profiler(exp: ExpManagerConfig) -> list[StepProfiler]:
    folder = Path(exp.explicit_log_dir) / "profile"
    return [] if exp.profile_steps is None else [StepProfiler(folder, *exp.profile_steps)]


def _seconds(limit: str | None) -> float | None:
    """``DD:HH:MM:SS`` in seconds."""
    if limit is None:
        return None
    days, hours, minutes, seconds = (int(part) for part in limit.split(":"))
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()
