"""Turn a Hugging Face model into a Megatron checkpoint and back.

Training reads Hugging Face directories directly, so converting first is only worth it to share one Megatron checkpoint
between runs. Under `torchrun` every rank handles its own slice, and no machine needs room for the whole model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_kto.config.architecture import Architecture, read_architecture, stored_dtype
from nemo_kto.config.layout import check_layout
from nemo_kto.config.locate import hf_side, is_megatron_checkpoint
from nemo_kto.errors import CheckpointError
from nemo_kto.quiet import quiet

EXAMPLE = """\
examples:
  nemo-kto convert hf-to-megatron --input meta-llama-8b/ --output meta-llama-8b-megatron/
  nemo-kto convert megatron-to-hf --input results/checkpoints/step-000200/ --output aligned-hf/
  torchrun --nproc-per-node 4 -m nemo_kto.cli.main convert megatron-to-hf \\
      --input CKPT --output HF --tensor-parallel 2 --pipeline-parallel 2"""
_DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the directions and their options."""
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    to_megatron = _direction(directions, "hf-to-megatron", "Hugging Face directory to Megatron checkpoint")
    to_megatron.add_argument(
        "--precision",
        choices=("bf16", "32"),
        help="of the checkpoint's weights (default: bf16 if config.json says bfloat16, otherwise 32)",
    )
    to_hf = _direction(directions, "megatron-to-hf", "Megatron checkpoint to a directory that transformers loads")
    to_hf.add_argument("--dtype", choices=_DTYPES, help="of the written weights (default: that of config.json)")


def run(args: argparse.Namespace) -> int:
    """Convert; the configuration is checked before anything heavy is imported."""
    quiet()
    if args.direction == "hf-to-megatron":
        return _hf_to_megatron(args)
    return _megatron_to_hf(args)


def _direction(directions: argparse._SubParsersAction, name: str, what: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    parser = directions.add_parser(name, help=what, description=what)
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="directory to read")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="ranks that share each layer")
    parser.add_argument("--pipeline-parallel", type=int, default=1, metavar="N", help="ranks that share the layers")
    return parser


def _checked(args: argparse.Namespace, hf_dir: Path) -> Architecture:
    arch = read_architecture(hf_dir)
    check_layout(arch, tensor_parallel=args.tensor_parallel, pipeline_parallel=args.pipeline_parallel)
    return arch


def _hf_to_megatron(args: argparse.Namespace) -> int:
    arch = _checked(args, args.input)
    if args.output.exists():
        raise CheckpointError(f"{args.output} exists: remove it or choose another --output")
    bf16 = stored_dtype(args.input) == "bfloat16" if args.precision is None else args.precision == "bf16"

    from nemo_kto import launch

    groups = launch.start(args.tensor_parallel, args.pipeline_parallel)

    from nemo_kto.checkpoint.dist import save_model
    from nemo_kto.checkpoint.hf_load import load_hf
    from nemo_kto.gpt.build import PlainNetwork, build_gpt

    chunks = build_gpt(arch, PlainNetwork(), bf16=bf16, groups=groups)
    load_hf(chunks, arch, args.input, groups)
    save_model(chunks, args.input, args.output, groups)
    _report(args, "bf16" if bf16 else "float32", groups.model_rank + groups.dp_rank == 0)
    launch.shutdown()
    return 0


def _megatron_to_hf(args: argparse.Namespace) -> int:
    if not is_megatron_checkpoint(args.input):
        raise CheckpointError(f"{args.input} is not a Megatron checkpoint; give a directory that holds metadata.json")
    hf_dir = hf_side(args.input)
    arch = _checked(args, hf_dir)
    name = args.dtype or stored_dtype(hf_dir) or "float32"

    from nemo_kto import launch

    groups = launch.start(args.tensor_parallel, args.pipeline_parallel)

    import torch

    from nemo_kto.checkpoint.dist import load_model
    from nemo_kto.checkpoint.hf_export import export_hf
    from nemo_kto.gpt.build import PlainNetwork, build_gpt

    # float32 holds every stored dtype exactly, so the checkpoint's own need not be known here
    chunks = build_gpt(arch, PlainNetwork(), bf16=False, groups=groups)
    load_model(chunks, args.input, groups)
    export_hf(chunks, arch, groups, hf_dir, args.output, dtype=getattr(torch, name))
    _report(args, name, groups.model_rank + groups.dp_rank == 0)
    launch.shutdown()
    return 0


def _report(args: argparse.Namespace, dtype: str, is_leader: bool) -> None:
    if is_leader:
        print(f"{args.input} -> {args.output} ({dtype})")
