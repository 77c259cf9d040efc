"""Train a model with KTO.

Settings are Hydra overrides of conf/gpt_kto.yaml, where every key is explained. Runs alone, under torchrun and under
srun; trainer.devices=N alone starts N processes on this machine.
"""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_kto import interrupts
from nemo_kto.cli.processes import run_processes
from nemo_kto.config.world import World, unused_tasks, world_from_environment
from nemo_kto.errors import ConfigError

if TYPE_CHECKING:
    from nemo_kto.config.architecture import Architecture
    from nemo_kto.config.schema import Config
    from nemo_kto.distributed.join import Timeouts
    from nemo_kto.training.run_data import RunData

logger = logging.getLogger(__name__)

EXAMPLE = """\
examples:
  nemo-kto train pretrained_checkpoint.restore_from_path=SmolLM2-135M-Instruct \\
      'model.data.data_prefix.train=[train.jsonl]' 'model.data.data_prefix.validation=[heldout.jsonl]' \\
      exp_manager.explicit_log_dir=results model.kto.ref_policy_kl_penalty=0.1
  torchrun --nproc-per-node 8 -m nemo_kto.cli.main train layout=8gpu ...
  nemo-kto train --config-dir . --config-name my_run     # my_run.yaml: defaults: [gpt_kto, _self_]
  nemo-kto train --cfg ...                               # print the resolved config and stop
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Hydra's usual options, and overrides."""
    parser.add_argument("overrides", nargs="*", help="key=value, or group=choice (loss=kto_paper, layout=8gpu)")
    parser.add_argument("--config-dir", "--config-path", "-cd", "-cp", help="directory of your own yaml")
    parser.add_argument("--config-name", "-cn", default="gpt_kto", help="its name (default: the shipped gpt_kto)")
    parser.add_argument("--cfg", action="store_true", help="print the resolved config and stop")


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked cheaply, then train."""
    interrupts.listen()  # a signal may come while heavy packages are imported
    from nemo_kto.cli.archives import unpacked_run
    from nemo_kto.config.checks import check
    from nemo_kto.config.load import load_config, to_yaml
    from nemo_kto.config.resume import check_resume
    from nemo_kto.quiet import quiet

    quiet()
    config = load_config(args.overrides, config_dir=args.config_dir, config_name=args.config_name)
    if args.cfg:
        print(to_yaml(config), end="")
        return 0
    found = world_from_environment()
    world = intended_world(config, found)
    check(config, world.size, world.num_nodes)
    config = unpacked_run(config)
    check_model(config)
    _check_places(config)
    data = read_data(config)
    notes = check_resume(config, data.identity)
    if world.size > 1 and not found.launched:
        return run_processes(world.size, ["train", *own_yaml(args), *args.overrides])
    for note in (*notes, unused_tasks(world)):
        if note is not None:
            logger.warning("%s", note)
    return _train(config, data, world)


def own_yaml(args: argparse.Namespace) -> list[str]:
    """The options that say where the config is."""
    return ["--config-name", args.config_name, *(["--config-dir", args.config_dir] if args.config_dir else [])]


def intended_world(config: Config, found: World) -> World:
    """The launcher's world; without a launcher, as many processes as ``trainer.devices`` asks for."""
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    if not found.launched:
        if nodes not in (None, 1):
            raise ConfigError(f"trainer.num_nodes={nodes}: start one torchrun per node, or use srun")
        size = devices or 1
        return World(rank=0, size=size, local_size=size, launched=False)
    for key, asked, there in (
        ("trainer.devices", devices, found.local_size),
        ("trainer.num_nodes", nodes, found.num_nodes),
    ):
        if asked is not None and asked != there:
            raise ConfigError(f"{key}={asked}, but the launcher started {there}: make them equal, or leave it null")
    return found


def check_model(config: Config) -> None:
    """Model, reference, adapters and layout: everything that needs neither torch nor data."""
    from nemo_kto.config.adapter_record import holds_adapters
    from nemo_kto.config.architecture import read_architecture
    from nemo_kto.config.checks import check_length, check_recompute
    from nemo_kto.config.layout import check_layout
    from nemo_kto.config.locate import hf_side
    from nemo_kto.config.lora import check_layers, lora_spec

    model, start = config.model, config.pretrained_checkpoint.restore_from_path
    arch = read_architecture(hf_side(start))
    if holds_adapters(start):
        raise ConfigError(
            f"pretrained_checkpoint.restore_from_path={start} holds adapters alone: give their base model there, "
            "model.peft.peft_scheme=lora, and this as model.peft.restore_from_path"
        )
    check_layout(
        arch,
        tensor_parallel=model.tensor_model_parallel_size,
        pipeline_parallel=model.pipeline_model_parallel_size,
    )
    check_length(arch, model.data.seq_length)
    check_recompute(arch, model)
    _check_same_network(config, arch)
    spec = lora_spec(model.peft)
    if spec is not None:
        check_layers(spec, arch.num_layers, model.pipeline_model_parallel_size)


def _check_places(config: Config) -> None:
    """What the run would start or go on from, and where it writes."""
    from nemo_kto.config.locate import resume_path
    from nemo_kto.config.log_dir import check_log_dir

    if resume_path(config.exp_manager) is None:
        _check_earlier_adapters(config)
    elif config.model.peft.restore_from_path is not None:
        logger.info("the run goes on with its checkpoint's adapters: model.peft.restore_from_path is not read again")
    check_log_dir(Path(config.exp_manager.explicit_log_dir))


def _check_earlier_adapters(config: Config) -> None:
    """Whether the adapters that a new run starts from are the ones it describes."""
    from nemo_kto.config.adapter_record import read_record
    from nemo_kto.config.lora import lora_spec
    from nemo_kto.config.peft_dir import is_peft_directory, read_adapters

    spec, start = lora_spec(config.model.peft), config.model.peft.restore_from_path
    if spec is not None and start is not None:
        found = read_adapters(start).spec() if is_peft_directory(start) else read_record(start).spec
        found.check_same(spec, start)


def _check_same_network(config: Config, policy: Architecture) -> None:
    """The reference's weights take the place of the policy's, so both must be of one shape and computed alike."""
    from nemo_kto.config.architecture import read_architecture
    from nemo_kto.config.locate import hf_side

    path = config.model.kto.reference_from_path
    kept = Path(config.exp_manager.explicit_log_dir) / "reference"
    if Path(path).resolve() == kept.resolve():
        raise ConfigError(f"model.kto.reference_from_path={path} is where this run keeps its own: move it elsewhere")
    reference = asdict(read_architecture(hf_side(path)))
    for name, value in asdict(policy).items():
        if reference[name] != value and name != "max_position_embeddings":
            raise ConfigError(
                f"model.kto.reference_from_path={path} is another network than the policy: {name} is "
                f"{reference[name]}, not {value}"
            )


def read_data(config: Config) -> RunData:
    """Validate and tokenise, from the cache where it has these very bytes, and plan the steps."""
    from nemo_kto.config.architecture import read_architecture
    from nemo_kto.config.checks import check_profile, check_schedule
    from nemo_kto.config.locate import hf_side
    from nemo_kto.data.tokenize import build_store
    from nemo_kto.data.vocabulary import check_vocabulary
    from nemo_kto.training.run_data import RunData

    data = config.model.data
    tokenizer = hf_side(config.pretrained_checkpoint.restore_from_path)
    train = build_store(data.data_prefix.train, tokenizer, data)
    files = data.data_prefix.validation
    validation = build_store(files, tokenizer, data) if files else None
    network = read_architecture(tokenizer)
    check_vocabulary(train, data.data_prefix.train, network.vocab_size, tokenizer)
    if validation is not None:
        check_vocabulary(validation, files or [], network.vocab_size, tokenizer)
    plan = RunData(config, train, validation, network)
    check_schedule(config.model.optim, plan.total_steps)
    check_profile(config.exp_manager.profile_steps, plan.total_steps)
    return plan


def _train(config: Config, data: RunData, world: World) -> int:
    from nemo_kto import cpu_backend
    from nemo_kto.quiet import quiet_nemo

    prepare_device(config, on_cpu=cpu_backend.install())
    quiet_nemo()
    from nemo_kto.launch import enter, shutdown
    from nemo_kto.training.trainer import fit

    enter(world, timeouts_of(config))
    if world.rank == 0:
        _announce_world(config, world)
        _announce(config, data)
    newest = fit(config, data, world)
    if world.rank == 0:
        print(f"done: {data.total_steps} steps, {newest or 'no checkpoint (exp_manager.create_checkpoint_callback)'}")
        if newest is not None:
            form = "" if config.model.peft.peft_scheme == "none" else "--merge "
            print(f"next: nemo-kto convert megatron-to-hf {form}--input {newest} --output HF_DIR")
    shutdown()
    return 0


def prepare_device(config: Config, *, on_cpu: bool) -> None:
    """Megatron runs on CUDA where there is CUDA; a config that asks for the other one cannot be obeyed."""
    accelerator = config.trainer.accelerator
    # one queue per device keeps Megatron's overlapped collectives in order; must be set before CUDA starts
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if accelerator == "gpu" and on_cpu:
        raise ConfigError("trainer.accelerator=gpu, but torch sees no CUDA device: use auto, or check the driver")
    if accelerator == "cpu" and not on_cpu:
        raise ConfigError("trainer.accelerator=cpu, but torch sees CUDA devices: also set CUDA_VISIBLE_DEVICES=''")


def timeouts_of(config: Config) -> Timeouts:
    """How long this run's ranks wait for each other."""
    from nemo_kto.distributed.join import Timeouts

    return Timeouts(
        timedelta(minutes=config.trainer.join_timeout_minutes),
        timedelta(minutes=config.trainer.distributed_timeout_minutes),
    )


def _announce_world(config: Config, world: World) -> None:
    """One line, and a warning where the busiest groups have to talk over the network."""
    from nemo_kto.config.placement import describe, split_tensor_groups
    from nemo_kto.launch import channel, hosts

    tp, pp = config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size
    print(describe(world, tp, pp, hosts(), channel()))
    split = split_tensor_groups(tp, hosts())
    if split:
        logger.warning(
            "%d of %d tensor-parallel groups have ranks on several hosts, where every layer waits for the network: "
            "keep model.tensor_model_parallel_size=%d within the %d processes of a node, and under srun use "
            "--distribution=block",
            split,
            world.size // tp,
            tp,
            world.local_size,
        )


def _announce(config: Config, data: RunData) -> None:
    from nemo_kto.config.lora import rate_warning
    from nemo_kto.data.datamodule import warn_of_imbalance

    model = config.model
    print(f"training data: {data.train_summary.describe()}")
    if data.validation_summary is not None:
        print(f"validation data: {data.validation_summary.describe()}")
    dropped = data.train_sampler.dropped_per_epoch
    note = f", {dropped} rows left over in each" if dropped else ""
    print(f"{data.total_steps} steps of {model.global_batch_size} samples, {data.steps_per_epoch} per epoch{note}")
    warn_of_imbalance(data.train_summary, model.kto)
    if (warning := rate_warning(model)) is not None:
        logger.warning("%s", warning)
