"""Predict memory and time of every parallel layout for a model, and print the settings of the best one.

Nothing is loaded and nothing is started: sizes follow from config.json, speeds are assumptions (docs/sizing.md).
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from nemo_kto.errors import ConfigError

if TYPE_CHECKING:
    from nemo_kto.planning.request import Job, Machine

EXAMPLE = """\
examples:
  nemo-kto plan --model 70b --nodes 4 --seq-length 4096 --global-batch-size 64
  nemo-kto plan --model path/to/Llama-3.1-8B --gpus 8 --gpu-memory 80 --peft lora --top 3
  nemo-kto plan --model 8b --gpus 8 --json > plan.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face directory or config.json, or one of 7b, 8b, 13b, 70b")
    count = parser.add_mutually_exclusive_group(required=True)
    count.add_argument("--gpus", type=whole_number, metavar="N", help="GPUs in all")
    count.add_argument("--nodes", type=whole_number, metavar="N", help="nodes, all GPUs of which are used")
    add("--gpus-per-node", type=whole_number, default=8, metavar="N", help="(default: %(default)s)")
    add("--gpu-memory", type=positive_number, default=80.0, metavar="GB", help="of one GPU, 10^9 bytes (default: 80)")
    add("--reserve", type=fraction, default=0.1, help="part of it that stays free (default: %(default)s)")
    add("--seq-length", type=whole_number, default=1024, metavar="TOKENS", help="longest row (default: %(default)s)")
    add(
        "--mean-length",
        type=whole_number,
        metavar="TOKENS",
        help="mean row; for the time alone (default: the longest)",
    )
    add(
        "--global-batch-size",
        type=whole_number,
        default=64,
        metavar="N",
        help="samples per step (default: %(default)s)",
    )
    add("--precision", choices=("bf16", "32"), default="bf16", help="(default: %(default)s)")
    add("--peft", choices=("none", "lora"), default="none", help="lora: adapters on all linear layers")
    add("--adapter-dim", type=whole_number, metavar="N", help="rank of the adapters (default: 32)")
    add("--optimizer", choices=("distributed_fused_adam", "adamw"), default="distributed_fused_adam")
    speeds = parser.add_argument_group("speeds that are assumed, per GPU; they change the ranking, never the memory")
    speed = speeds.add_argument
    speed("--tflops", type=positive_number, metavar="N", help="sustained, 10^12 per second (default: bf16 400, 32 50)")
    speed(
        "--nvlink",
        type=positive_number,
        default=300.0,
        metavar="N",
        help="10^9 bytes/s one way (default: %(default)g)",
    )
    speed("--network", type=positive_number, default=40.0, metavar="N", help="to other nodes (default: %(default)g)")
    speed(
        "--host-link", type=positive_number, default=40.0, metavar="N", help="from host memory (default: %(default)g)"
    )
    add("--top", type=whole_number, default=10, metavar="N", help="layouts to show (default: %(default)s)")
    add("--json", action="store_true", help="print everything as JSON, in bytes and seconds")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from nemo_kto.planning.plan import make_plan
    from nemo_kto.planning.text import render

    plan = make_plan(job_of(args), machine_of(args))
    print(json.dumps(plan.to_json(args.top), indent=1) if args.json else render(plan, args.model, args.top))
    return 0


def job_of(args: argparse.Namespace) -> Job:
    """The run that the options describe.

    Raises:
        ConfigError: options contradict each other.
        CheckpointError: the model cannot be read.
    """
    from nemo_kto.planning.request import Job
    from nemo_kto.planning.shape import read_shape

    if args.adapter_dim is not None and args.peft == "none":
        raise ConfigError("--adapter-dim is of --peft lora: set that, or leave it out")
    return Job(
        arch=read_shape(args.model),
        world=args.gpus or args.nodes * args.gpus_per_node,
        gpus_per_node=args.gpus_per_node,
        seq_length=args.seq_length,
        global_batch_size=args.global_batch_size,
        bf16=args.precision == "bf16",
        optimizer=args.optimizer,
        lora_dim=None if args.peft == "none" else args.adapter_dim or 32,
        mean_length=args.mean_length,
    )


def machine_of(args: argparse.Namespace) -> Machine:
    """The machine that the options describe."""
    from nemo_kto.planning.request import GB, Machine

    return Machine(
        memory=int(args.gpu_memory * GB),
        reserve=args.reserve,
        flops=(args.tflops or (400.0 if args.precision == "bf16" else 50.0)) * 1e12,
        nvlink=args.nvlink * GB,
        network=args.network * GB,
        host_link=args.host_link * GB,
    )


def whole_number(text: str) -> int:
    """An option; the name stands in argparse's message."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def positive_number(text: str) -> float:
    """As :func:`whole_number`."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return number


def fraction(text: str) -> float:
    """As :func:`whole_number`."""
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be in [0, 1)")
    return number
