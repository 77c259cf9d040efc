"""Turn a Hugging Face model into a Megatron checkpoint or a .nemo archive, and back.

Training reads all three directly, so converting first is only worth it to share one checkpoint between runs. Under
`torchrun` every rank handles its own slice, and no machine needs room for the whole model.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_kto.cli.archives import unpacked
from nemo_kto.config.adapter_record import check_network, holds_adapters, read_record
from nemo_kto.config.architecture import Architecture, read_architecture, stored_dtype
from nemo_kto.config.layout import check_layout
from nemo_kto.config.locate import hf_side, is_megatron_checkpoint
from nemo_kto.config.world import world_from_environment
from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.quiet import quiet

if TYPE_CHECKING:
    from torch import nn

    from nemo_kto.distributed.groups import ParallelGroups

EXAMPLE = """\
examples:
  nemo-kto convert hf-to-megatron --input meta-llama-8b/ --output meta-llama-8b-megatron/
  nemo-kto convert megatron-to-hf --input results/checkpoints/step-000200/ --output aligned-hf/
  nemo-kto convert megatron-to-hf --adapter --input lora/checkpoints/step-000200/ --output peft-adapter/
  nemo-kto convert megatron-to-hf --merge --input lora/checkpoints/step-000200/ --output aligned-hf/
  torchrun --nproc-per-node 4 -m nemo_kto.cli.main convert megatron-to-hf \\
      --input CKPT --output HF --tensor-parallel 2 --pipeline-parallel 2
  nemo-kto convert to-nemo --input results/checkpoints/step-000200/ --output aligned.nemo
  nemo-kto convert from-nemo --input llama2-7b.nemo --output llama2-7b-hf/"""
logger = logging.getLogger(__name__)

_DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the directions and their options."""
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    to_megatron = _direction(directions, "hf-to-megatron", "Hugging Face directory to Megatron checkpoint")
    to_hf = _direction(directions, "megatron-to-hf", "Megatron checkpoint to a directory that transformers loads")
    to_nemo = _direction(
        directions, "to-nemo", "Hugging Face directory or Megatron checkpoint to .nemo archive", output="FILE"
    )
    from_nemo = _direction(
        directions, "from-nemo", ".nemo archive to a directory that transformers loads", source="FILE"
    )
    for direction in (to_megatron, to_nemo):
        direction.add_argument(
            "--precision",
            choices=("bf16", "32"),
            help="of the written weights (default: bf16 if config.json says bfloat16, otherwise 32)",
        )
    form = to_hf.add_mutually_exclusive_group()
    form.add_argument("--adapter", action="store_true", help="of a LoRA run: write the adapters, for PEFT to load")
    form.add_argument("--merge", action="store_true", help="of a LoRA run: write base + adapters as one model")
    to_hf.add_argument(
        "--base",
        type=Path,
        metavar="MODEL",
        help="with these: the base model, a directory of either kind or a .nemo file (default: the run's)",
    )
    for direction in (to_hf, from_nemo):
        direction.add_argument("--dtype", choices=_DTYPES, help="of the written weights (default: that of the input)")
    from_nemo.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="Hugging Face directory with the tokenizer, if FILE lacks it"
    )


def run(args: argparse.Namespace) -> int:
    """Convert; the configuration is checked before anything heavy is imported."""
    quiet()
    directions = {
        "hf-to-megatron": _hf_to_megatron,
        "megatron-to-hf": _megatron_to_hf,
        "to-nemo": _to_nemo,
        "from-nemo": _from_nemo,
    }
    return directions[args.direction](args)


def _direction(
    directions: argparse._SubParsersAction,  # type: ignore[type-arg]
    name: str,
    what: str,
    source: str = "DIR",
    output: str = "DIR",
) -> argparse.ArgumentParser:
    parser = directions.add_parser(name, help=what, description=what)
    parser.add_argument("--input", type=Path, required=True, metavar=source, help="what to read")
    parser.add_argument("--output", type=Path, required=True, metavar=output, help="what to write")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="ranks that share each layer")
    parser.add_argument("--pipeline-parallel", type=int, default=1, metavar="N", help="ranks that share the layers")
    return parser


def _checked(args: argparse.Namespace, hf_dir: Path) -> Architecture:
    arch = read_architecture(hf_dir)
    check_layout(arch, tensor_parallel=args.tensor_parallel, pipeline_parallel=args.pipeline_parallel)
    return arch


def _hf_to_megatron(args: argparse.Namespace) -> int:
    arch = _checked(args, args.input)
    chunks, groups, bf16 = _loaded_for_saving(args, arch, args.input)

    from nemo_kto.checkpoint.dist import save_model

    save_model(chunks, args.input, args.output, groups)
    return _end(args, "bf16" if bf16 else "float32", groups)


def _to_nemo(args: argparse.Namespace) -> int:
    if holds_adapters(args.input):
        raise ConfigError(
            f"{args.input} holds LoRA adapters alone: merge them first, with convert megatron-to-hf --merge "
            f"--input {args.input} --output HF_DIR, then give HF_DIR here"
        )
    hf_dir = hf_side(args.input)
    arch = _checked(args, hf_dir)
    if args.output.suffix != ".nemo":
        raise ConfigError(f"--output {args.output} must end in .nemo")
    chunks, groups, bf16 = _loaded_for_saving(args, arch, hf_dir)

    from nemo_kto.checkpoint.nemo_save import save_nemo

    save_nemo(chunks, arch, hf_dir, args.output, groups)
    return _end(args, "bf16" if bf16 else "float32", groups)


def _loaded_for_saving(
    args: argparse.Namespace, arch: Architecture, hf_dir: Path
) -> tuple[Sequence[nn.Module], ParallelGroups, bool]:
    """The input's weights in the precision to write, and whether that is bf16."""
    if args.output.exists():
        raise CheckpointError(f"{args.output} exists: remove it or choose another --output")
    bf16 = stored_dtype(hf_dir) == "bfloat16" if args.precision is None else args.precision == "bf16"
    chunks, groups = _loaded(args, arch, args.input, bf16=bf16)
    return chunks, groups, bf16


def _loaded(
    args: argparse.Namespace, arch: Architecture, path: Path, *, bf16: bool
) -> tuple[Sequence[nn.Module], ParallelGroups]:
    from nemo_kto import launch

    groups = launch.start(args.tensor_parallel, args.pipeline_parallel)

    from nemo_kto.checkpoint.weights import load_weights
    from nemo_kto.gpt.build import PlainNetwork, build_gpt

    chunks = build_gpt(arch, PlainNetwork(), bf16=bf16, groups=groups)
    load_weights(chunks, arch, path, groups)
    return chunks, groups


def _megatron_to_hf(args: argparse.Namespace) -> int:
    if not is_megatron_checkpoint(args.input):
        raise CheckpointError(f"{args.input} is not a Megatron checkpoint; give a directory that holds metadata.json")
    if holds_adapters(args.input):
        return _merged(args) if args.merge else _to_peft(args)
    if args.adapter or args.merge or args.base:
        raise ConfigError(f"{args.input} is a whole model: --adapter, --merge and --base are for LoRA runs")
    return _export(args, args.input)


def _to_peft(args: argparse.Namespace) -> int:
    if not args.adapter:
        raise ConfigError(
            f"{args.input} holds LoRA adapters: --adapter writes them for PEFT, --merge writes base + adapters"
        )
    if args.tensor_parallel * args.pipeline_parallel * world_from_environment().size > 1:
        raise ConfigError("--adapter runs as one process: adapters are small")
    if args.dtype not in (None, "float32"):
        raise ConfigError(f"--dtype {args.dtype} does not go with --adapter: adapters are float32")
    arch = _checked(args, hf_side(args.input))
    from nemo_kto import launch

    base = _base(args) if args.base else None
    groups = launch.start(1, 1)
    if base is not None:
        _check_named(base, args.input)
    from nemo_kto.checkpoint.peft_export import export_peft

    export_peft(args.input, arch, args.output, base=args.base and str(args.base))
    return _end(args, "float32", groups)


def _merged(args: argparse.Namespace) -> int:
    return _export(args, _base(args), adapters=args.input)


def _base(args: argparse.Namespace) -> Path:
    """The directory of the base model: of whatever ``--base`` names, or the run's own."""
    if args.base and not args.base.exists():
        raise CheckpointError(f"--base {args.base} is not there: name the base model of {args.input}")
    base = unpacked(args.base, None) if args.base else Path(read_record(args.input).base)
    if not base.is_dir():
        raise CheckpointError(f"{base}, the base model of {args.input}, is not there: name it with --base")
    return base


def _check_named(base: Path, adapters: Path) -> None:
    """Refuse a base model that adapters do not belong to, as far as files tell; one process has no room to compare."""
    from nemo_kto.checkpoint.base_identity import base_identity

    record = read_record(adapters)
    if is_megatron_checkpoint(record.base) and not is_megatron_checkpoint(base):
        check_network(base, adapters)
        logger.warning(
            "%s was trained on %s, a Megatron checkpoint: that %s has the same weights is taken on trust",
            *(adapters, record.base, base),
        )
        return
    record.check_base(base, base_identity(base), adapters)


def _from_nemo(args: argparse.Namespace) -> int:
    from nemo_kto.checkpoint.nemo_model import model_directory

    # not in the cache: what is converted once is not unpacked again
    aside = args.output.with_name(f".{args.output.name}.unpacked")
    try:
        return _export(args, model_directory(args.input, aside, args.tokenizer))
    finally:
        if world_from_environment().rank == 0:
            shutil.rmtree(aside, ignore_errors=True)


def _export(args: argparse.Namespace, model: Path, adapters: Path | None = None) -> int:
    """Write a model directory of any kind, with adapters merged into it, as Hugging Face has it."""
    hf_dir = hf_side(model)
    arch = _checked(args, hf_dir)
    name = args.dtype or stored_dtype(hf_dir) or "float32"
    # float32 holds every stored dtype exactly, so the checkpoint's own need not be known here
    chunks, groups = _loaded(args, arch, model, bf16=False)
    if adapters is not None:
        from nemo_kto.checkpoint.adapters import add_adapters
        from nemo_kto.gpt.lora import merge

        add_adapters(chunks, arch, adapters, model, groups)
        merge(chunks)

    import torch

    from nemo_kto.checkpoint.hf_export import export_hf

    export_hf(chunks, arch, groups, hf_dir, args.output, dtype=getattr(torch, name))
    return _end(args, name, groups)


def _end(args: argparse.Namespace, dtype: str, groups: ParallelGroups) -> int:
    from nemo_kto.launch import shutdown

    if groups.model_rank + groups.dp_rank == 0:
        print(f"{args.input} -> {args.output} ({dtype})")
    shutdown()
    return 0
