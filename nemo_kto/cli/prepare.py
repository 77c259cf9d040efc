"""Check training data, show what it is like and what to set, and write it cleaned.

Reads .jsonl, .jsonl.gz and .parquet with the keys prompt, response, preference (or prompt, completion, label). Every
bad record is named with its file and line, and the exit code is then 3.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_kto.data.problems import Problems
from nemo_kto.data.records import Record, iter_records
from nemo_kto.errors import ConfigError

if TYPE_CHECKING:
    from nemo_kto.data.store import TokenStore
    from nemo_kto.data.survey import Lengths, Survey

EXAMPLE = """\
examples:
  nemo-kto prepare --data train.jsonl --tokenizer MODEL
  nemo-kto prepare --data a.parquet b.jsonl.gz --tokenizer MODEL --seq-length 1024 --out clean.jsonl
  nemo-kto prepare --data train.jsonl --tokenizer MODEL --seq-length 1024 --cache-dir CACHE"""

UNLIMITED = 2**31 - 1  # tokens; longer rows exist nowhere


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help=".jsonl, .jsonl.gz or .parquet")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face directory of the model")
    parser.add_argument(
        "--seq-length", type=int, metavar="N", help="model.data.seq_length: count rows that are longer"
    )
    parser.add_argument(
        "--overlong",
        choices=("drop", "truncate", "error"),
        help="with --seq-length, as model.data.overlong (default: drop); --out omits the rows that training drops, "
        "and holds whole those that it truncates",
    )
    parser.add_argument(
        "--append-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="count an EOS at the end of responses that have none, as training does",
    )
    parser.add_argument(
        "--out",
        metavar="FILE.jsonl",
        help="write the records that training would use, with only prompt, response and preference",
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="also fill this token cache (model.data.cache_dir), for training with the same --seq-length, --overlong "
        "and EOS: it then starts at once",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Check, measure, print, and write what was asked for."""
    _check(args)
    from tempfile import TemporaryDirectory

    from nemo_kto.data.survey import survey

    with TemporaryDirectory(prefix="nemo_kto_prepare_") as scratch:
        store = _tokenise(args, scratch, UNLIMITED, "drop")  # uncut: lengths are to be seen as they are
        result = survey(store)
        fates = _fates(store, args)
    written = _write(args, fates) if args.out else None
    if args.cache_dir is not None:
        _tokenise(args, args.cache_dir, args.seq_length, args.overlong or "drop")
    if args.json:
        report = {"files": args.data, **asdict(result), **_overlong(fates, args), "advice": result.advice()}
        print(json.dumps({**report, "written": written}, indent=2))
    else:
        print("\n".join(_text(args, result, fates, written)))
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.seq_length is None and args.overlong is not None:
        raise ConfigError("--overlong says what happens to rows longer than --seq-length: give --seq-length too")
    if args.seq_length is not None and args.seq_length < 2:
        raise ConfigError(
            f"--seq-length {args.seq_length} leaves no room for a prompt and a response: give at least 2"
        )
    if args.seq_length is None and args.cache_dir is not None:
        raise ConfigError("--cache-dir holds rows cut to a length: give --seq-length, as model.data.seq_length")
    if not args.out:
        return
    if not args.out.lower().endswith(".jsonl"):
        raise ConfigError(f"--out {args.out} must end in .jsonl: that is what is written")
    if os.path.realpath(args.out) in map(os.path.realpath, args.data):
        raise ConfigError(f"--out {args.out} is one of the files of --data: give another name")
    if not Path(args.out).resolve().parent.is_dir():
        raise ConfigError(f"--out {args.out}: its directory does not exist; make it, or give another name")


def _tokenise(args: argparse.Namespace, cache_dir: str, seq_length: int, overlong: str) -> TokenStore:
    """All rows, as training with such settings has them."""
    from nemo_kto.config.schema import DataConfig, DataFilesConfig
    from nemo_kto.data.tokenize import build_store

    config = DataConfig(
        data_prefix=DataFilesConfig(args.data, None),
        seq_length=seq_length,
        packing=True,
        shuffle=False,
        append_eos=args.append_eos,
        overlong=overlong,
        num_workers=0,
        tokenize_workers=None,
        cache_dir=cache_dir,
    )
    return build_store(args.data, args.tokenizer, config)


def _fates(store: TokenStore, args: argparse.Namespace) -> list[str]:
    """What training would do with each record: "keep", "truncate" or "drop".

    Raises:
        DataError: with ``--overlong error``, if a row is too long.
    """
    if args.seq_length is None:
        return ["keep"] * len(store)
    total, prompts = store.lengths(store.record_index), store.prompt_lengths
    fates = []
    for length, prompt in zip(total.tolist(), prompts.tolist(), strict=True):
        cut = args.overlong == "truncate" and prompt < args.seq_length
        fates.append("keep" if length <= args.seq_length else "truncate" if cut else "drop")
    if args.overlong == "error":
        problems = Problems("rows are too long; problems")
        for record, fate, length in zip(iter_records(args.data), fates, total.tolist(), strict=True):
            if fate != "keep":
                problems.add(record.where, f"makes {length} tokens; want at most --seq-length {args.seq_length}")
        problems.raise_if_any()
    return fates


def _write(args: argparse.Namespace, fates: Sequence[str]) -> int:
    """Write the kept records, all or nothing; returns their number."""
    out = Path(args.out)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with aside.open("w", encoding="utf-8") as file:
            for record in _kept(args.data, fates):
                file.write(json.dumps(_plain(record), ensure_ascii=False) + "\n")
                count += 1
        aside.replace(out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}): give another name") from error
    finally:
        aside.unlink(missing_ok=True)
    return count


def _kept(files: Sequence[str], fates: Sequence[str]) -> Iterator[Record]:
    for record, fate in zip(iter_records(files), fates, strict=True):
        if fate != "drop":
            yield record


def _plain(record: Record) -> dict[str, Any]:
    texts = {
        key: text if isinstance(text, str) else [message._asdict() for message in text]
        for key, text in (("prompt", record.prompt), ("response", record.response))
    }
    return {**texts, "preference": "chosen" if record.desirable else "rejected"}


def _overlong(fates: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    if args.seq_length is None:
        return {}
    return {"seq_length": args.seq_length, "dropped": fates.count("drop"), "truncated": fates.count("truncate")}


def _text(args: argparse.Namespace, result: Survey, fates: Sequence[str], written: int | None) -> list[str]:
    lines = [
        f"files             {', '.join(args.data)}",
        f"records           {result.num_rows}, all usable: {result.num_desirable} desirable, "
        f"{result.num_undesirable} undesirable",
        _length_line("tokens", None),
        _length_line("  prompt", result.prompt_tokens),
        _length_line("  response", result.response_tokens),
        _length_line("  total", result.total_tokens),
        f"boundary merges   {result.boundary_merges}",
        f"distinct          {result.distinct_prompts} prompts, {result.distinct_responses} responses",
        f"repeated          {result.repeated_rows} rows; {result.contradictions} labelled both ways",
        f"in a row          up to {result.longest_prompt_run} with one prompt, {result.longest_response_run} with one "
        "response",
    ]
    if args.seq_length is not None:
        counts = f"{fates.count('drop')} rows dropped, {fates.count('truncate')} truncated"
        lines.append(f"{f'at {args.seq_length} tokens':<17} {counts}")
    if written is not None:
        lines.append(f"written           {written} records to {args.out}")
    return [*lines, "advice", *(f"  - {advice}" for advice in result.advice())]


def _length_line(title: str, lengths: Lengths | None) -> str:
    if lengths is None:
        cells = ["p50", "p90", "p95", "p99", "max", "mean"]
    else:
        cells = [*map(str, lengths.percentiles.values()), str(lengths.max), str(lengths.mean)]
    return f"{title:<17}" + "".join(f"{cell:>9}" for cell in cells)
