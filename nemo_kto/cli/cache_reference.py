"""Score training data under the reference once, before trainings with model.kto.reference=cache.

Takes the overrides of the training to come, and scores what that will ask for: samples and mismatched pairs of all
its epochs, and its validation data. What the cache has already is not scored again, so the same command goes on where
it was stopped or killed. Runs alone, under torchrun and under srun; trainer.devices=N alone starts N processes.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from nemo_kto import interrupts
from nemo_kto.cli import train
from nemo_kto.cli.processes import run_processes
from nemo_kto.config.world import world_from_environment

if TYPE_CHECKING:
    from nemo_kto.config.schema import Config
    from nemo_kto.config.world import World
    from nemo_kto.reference.cache import CachedReference
    from nemo_kto.training.reference_cache import Filled
    from nemo_kto.training.run_data import RunData

EXAMPLE = """\
examples:
  nemo-kto cache-reference pretrained_checkpoint.restore_from_path=SmolLM2-135M-Instruct \\
      'model.data.data_prefix.train=[train.jsonl]' model.kto.reference_cache_dir=cache model.kto.fixed_pairs=true
  nemo-kto train model.kto.reference=cache ...           # with the same overrides
  torchrun --nproc-per-node 8 -m nemo_kto.cli.main cache-reference layout=8gpu ...
"""
_SECONDS_BETWEEN_LINES = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``train``."""
    train.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check as ``train`` does, then score."""
    interrupts.listen()
    from nemo_kto.cli.archives import unpacked_run
    from nemo_kto.config.checks import check
    from nemo_kto.config.load import load_config, to_yaml
    from nemo_kto.config.reference_cache import with_cache
    from nemo_kto.quiet import quiet

    quiet()
    config = with_cache(load_config(args.overrides, config_dir=args.config_dir, config_name=args.config_name))
    if args.cfg:
        print(to_yaml(config), end="")
        return 0
    found = world_from_environment()
    world = train.intended_world(config, found)
    check(config, world.size, world.num_nodes)
    config = unpacked_run(config)
    train.check_model(config)
    data = train.read_data(config)
    if world.size > 1 and not found.launched:
        return run_processes(world.size, ["cache-reference", *train.own_yaml(args), *args.overrides])
    return _fill(config, data, world)


def _fill(config: Config, data: RunData, world: World) -> int:
    from nemo_kto import cpu_backend

    train.prepare_device(config, on_cpu=cpu_backend.install())
    from nemo_kto.launch import shutdown, start
    from nemo_kto.training.policy import PolicyBuilder
    from nemo_kto.training.reference_cache import fill

    model = config.model
    groups = start(
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        seed=model.seed,
        timeouts=train.timeouts_of(config),
    )
    cache, columns = PolicyBuilder(config, groups, fitting=False).reference_alone()
    progress = _Progress(enabled=world.rank == 0)
    filled = fill(cache, columns, data, groups, progress.show)
    if world.rank == 0:
        _say(config, data, filled)
    shutdown()
    return 0


class _Progress:
    """A line every few seconds, and one at the end."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._began = self._last = time.monotonic()

    def show(self, done: int, total: int, cache: CachedReference) -> None:
        now = time.monotonic()
        if not self._enabled or (done < total and now - self._last < _SECONDS_BETWEEN_LINES):
            return
        self._last = now
        asked, scored = cache.rows_asked, cache.rows_computed
        speed = scored / max(now - self._began, 1e-9)
        sys.stderr.write(f"batch {done}/{total}  {asked} rows, {scored} of them scored ({speed:.1f} per s)\n")
        sys.stderr.flush()


def _say(config: Config, data: RunData, filled: Filled) -> None:
    kto = config.model.kto
    epochs = data.total_steps / data.steps_per_epoch
    pairs = "" if kto.loss_type == "apo_zero_unpaired" else " and pairs"
    validation = "" if data.validation_sampler is None else ", and the validation data"
    print(f"samples{pairs} of {data.total_steps} steps ({epochs:g} epochs){validation}: {filled.rows} rows")
    print(
        f"{filled.rows - filled.computed} were there, {filled.computed} computed in {filled.seconds:.1f} s, "
        f"{filled.bytes_written} bytes written to {kto.reference_cache_dir}"
    )
    print("next: nemo-kto train with the same overrides and model.kto.reference=cache")
