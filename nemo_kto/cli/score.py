"""Score records under a model and, against a reference, say how well it tells desirable from undesirable.

Writes one JSON line per record (log-probs and rewards in nats) and prints reward margin and AUC. Under `torchrun` the
model is sharded and the records are spread over data-parallel ranks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.quiet import quiet

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_kto.config.architecture import Architecture
    from nemo_kto.data.store import TokenStore
    from nemo_kto.distributed.groups import ParallelGroups
    from nemo_kto.objective.ranking import Separation

EXAMPLE = """\
examples:
  nemo-kto score --model aligned-hf --reference SmolLM2-135M-Instruct --data heldout.jsonl --out scores.jsonl
  nemo-kto score --model BASE --adapter lora/checkpoints/step-000100 --data heldout.jsonl --out scores.jsonl
  torchrun --nproc-per-node 4 -m nemo_kto.cli.main score --tensor-parallel 2 \\
      --model results/checkpoints/step-000100 --reference BASE --data heldout.jsonl --out scores.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, data, where results go, and the layout."""
    model = "Hugging Face directory, Megatron checkpoint or .nemo file"
    parser.add_argument("--model", required=True, type=Path, help=f"the policy: {model}")
    parser.add_argument("--reference", type=Path, help=f"the reference policy: {model}; without it, no rewards")
    parser.add_argument(
        "--adapter",
        type=Path,
        help="LoRA adapters on --model: a checkpoint or a PEFT directory; the reference is then --model without them",
    )
    parser.add_argument("--data", required=True, nargs="+", help=".jsonl, .jsonl.gz or .parquet files")
    parser.add_argument("--out", required=True, type=Path, help="JSONL file to write")
    parser.add_argument("--summary-json", type=Path, help="file for the printed summary, as JSON")
    parser.add_argument("--beta", type=float, default=0.1, help="reward = beta x log-ratio (default: 0.1)")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="rows per forward (default: 8)")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32", help="of weights and activations")
    parser.add_argument("--seq-length", type=int, help="longest prompt + response in tokens (default: the model's)")
    parser.add_argument("--overlong", choices=("error", "drop", "truncate"), default="error", help="longer rows")
    parser.add_argument("--no-append-eos", action="store_true", help="do not close responses with EOS")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks that share each matrix")
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="ranks that share the layers")
    parser.add_argument(
        "--cache-dir", help="of tokens and unpacked .nemo files (default: ~/.cache/nemo_kto, or $NEMO_KTO_CACHE)"
    )


def run(args: argparse.Namespace) -> int:
    """Check, score under the policy, then under the reference in the same memory, and write."""
    quiet()
    arch, store = _prepare(args)

    from nemo_kto.launch import shutdown, start

    groups = start(args.tensor_parallel, args.pipeline_parallel)
    policy, reference, tokens = _score(args, arch, store, groups)
    if groups.model_rank + groups.dp_rank == 0:
        _report(args, store, policy, reference, tokens)
    shutdown()
    return 0


def _check_options(args: argparse.Namespace) -> None:
    for name, value in (("--micro-batch-size", args.micro_batch_size), ("--seq-length", args.seq_length)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} must be at least 1")
    if not args.beta > 0:
        raise ConfigError(f"--beta {args.beta} must be above 0")
    for option, path in (("--out", args.out), ("--summary-json", args.summary_json)):
        if path is not None and not path.resolve().parent.is_dir():
            raise ConfigError(f"{option} {path}: the directory {path.resolve().parent} does not exist")
        if path is not None and path.is_dir():
            raise ConfigError(f"{option} {path} is a directory: name a file in it")


def _prepare(args: argparse.Namespace) -> tuple[Architecture, TokenStore]:
    from nemo_kto.cli.archives import unpacked
    from nemo_kto.config.architecture import read_architecture
    from nemo_kto.config.checks import check_length
    from nemo_kto.config.layout import check_layout
    from nemo_kto.config.locate import hf_side
    from nemo_kto.config.schema import DataConfig, DataFilesConfig
    from nemo_kto.data.tokenize import build_store
    from nemo_kto.data.vocabulary import check_vocabulary

    _check_options(args)
    if args.adapter is not None and args.reference is not None:
        raise ConfigError("--adapter and --reference exclude each other: with --adapter, --model is the reference")
    args.model = unpacked(args.model, args.cache_dir)
    args.reference = args.reference and unpacked(args.reference, args.cache_dir)
    arch = read_architecture(hf_side(args.model))
    if args.reference is not None and read_architecture(hf_side(args.reference)) != arch:
        raise CheckpointError(f"--model {args.model} and --reference {args.reference} differ in architecture")
    check_layout(arch, tensor_parallel=args.tensor_parallel, pipeline_parallel=args.pipeline_parallel)
    longest = args.seq_length or min(arch.max_position_embeddings, arch.sliding_window or arch.max_position_embeddings)
    check_length(arch, longest)
    data = DataConfig(
        data_prefix=DataFilesConfig(train=args.data, validation=None),
        seq_length=longest,
        packing=True,
        shuffle=False,
        append_eos=not args.no_append_eos,
        overlong=args.overlong,
        num_workers=0,
        tokenize_workers=None,
        cache_dir=args.cache_dir,
    )
    store = build_store(args.data, hf_side(args.model), data)
    check_vocabulary(store, args.data, arch.vocab_size, hf_side(args.model))
    return arch, store


def _score(
    args: argparse.Namespace, arch: Architecture, store: TokenStore, groups: ParallelGroups
) -> tuple[Tensor, Tensor | None, Tensor]:
    from nemo_kto.checkpoint.weights import load_weights
    from nemo_kto.gpt.build import PlainNetwork, build_gpt
    from nemo_kto.gpt.forward import Passes
    from nemo_kto.training.scoring import score_store

    chunks = build_gpt(arch, PlainNetwork(), bf16=args.precision == "bf16", groups=groups)
    passes = Passes(chunks, groups, arch.vocab_size)
    load_weights(chunks, arch, args.model, groups)
    if args.adapter is not None:
        from nemo_kto.checkpoint.adapters import add_adapters
        from nemo_kto.gpt.lora import adapters_off

        add_adapters(chunks, arch, args.adapter, args.model, groups)
        policy, tokens = score_store(passes, store, groups, args.micro_batch_size)
        with adapters_off(chunks):
            return policy, score_store(passes, store, groups, args.micro_batch_size)[0], tokens
    policy, tokens = score_store(passes, store, groups, args.micro_batch_size)
    if args.reference is None:
        return policy, None, tokens
    load_weights(chunks, arch, args.reference, groups)
    return policy, score_store(passes, store, groups, args.micro_batch_size)[0], tokens


def _report(
    args: argparse.Namespace, store: TokenStore, policy: Tensor, reference: Tensor | None, tokens: Tensor
) -> None:
    import torch

    from nemo_kto.objective.ranking import separation

    ratio = None if reference is None else (policy - reference).cpu()
    partial = args.out.with_name(f"{args.out.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for line in _lines(args.beta, store, policy, reference, tokens):
            file.write(json.dumps(line) + "\n")
    partial.rename(args.out)
    desirable = torch.from_numpy(store.desirable.copy())
    scores = policy.cpu() if ratio is None else args.beta * ratio
    found = separation(scores, desirable)
    if args.summary_json is not None:
        what = "policy_logp" if ratio is None else "reward"
        summary = {"score": what, "beta": args.beta, "records": len(store), **asdict(found)}
        args.summary_json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _print(found, "log-probs (nats; no reference given)" if ratio is None else f"rewards (beta {args.beta:g} x nats)")
    print(f"wrote {len(store)} lines to {args.out}")


def _lines(
    beta: float, store: TokenStore, policy: Tensor, reference: Tensor | None, tokens: Tensor
) -> Iterator[dict[str, Any]]:
    references = [None] * len(store) if reference is None else reference.tolist()
    columns = zip(store.record_index.tolist(), policy.tolist(), references, tokens.tolist(), strict=True)
    for index, logp, ref_logp, num_tokens in columns:
        log_ratio = None if ref_logp is None else logp - ref_logp
        yield {
            "index": index,
            "policy_logp": logp,
            "ref_logp": ref_logp,
            "log_ratio": log_ratio,
            "reward": None if log_ratio is None else beta * log_ratio,
            "num_tokens": num_tokens,
        }


def _print(found: Separation, what: str) -> None:
    def number(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.4f}"

    print(f"{found.num_desirable} desirable, {found.num_undesirable} undesirable; {what}:")
    print(f"  desirable {number(found.mean_desirable)}, undesirable {number(found.mean_undesirable)}")
    print(f"  margin {number(found.margin)} (standard error {number(found.margin_se)}), AUC {number(found.auc)}")
