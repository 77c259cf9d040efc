"""Operations of a step over NeMo-Aligner's algorithm, by the closed formula, for every batch of a data file.

What a few counted steps give depends on how unequal their rows happen to be; this is the whole distribution.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.kto_step.flops import Pass, Shape, step_flops


class Lengths(NamedTuple):
    """Tokens of one record: the prompt's, and the response's with the token that ends it."""

    prompt: int
    response: int


class Ratios(NamedTuple):
    """Ours over NeMo-Aligner's algorithm, for one batch."""

    swap: float
    cached: float


def read_lengths(data: Path, model: Path) -> list[Lengths]:
    """Lengths of the records of ``data`` (JSON lines of prompt and completion) under a model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    prompts = tokenizer([record["prompt"] for record in records])["input_ids"]
    whole = tokenizer([record["prompt"] + record["completion"] for record in records])["input_ids"]
    return [Lengths(len(p), len(w) - len(p) + 1) for p, w in zip(prompts, whole, strict=True)]


def ratios(lengths: Sequence[Lengths], shape: Shape, rows: int) -> Iterator[Ratios]:
    """For each whole batch of ``rows`` records: packed rows and scored positions alone, against a padded block."""
    for start in range(0, len(lengths) - rows + 1, rows):
        batch = lengths[start : start + rows]
        pairs = [Lengths(own.prompt, other.response) for own, other in zip(batch, batch[1:] + batch[:1], strict=True)]
        policy = [_packed(batch, trains=True), _packed(pairs, trains=False)]
        reference = [_packed(batch, trains=False), _packed(pairs, trains=False)]
        theirs = step_flops(shape, [_padded([*batch, *pairs], trains=trains) for trains in (True, False)])
        cached = step_flops(shape, policy)
        yield Ratios((cached + step_flops(shape, reference)) / theirs, cached / theirs)


def _inputs(row: Lengths) -> int:
    return row.prompt + row.response - 1  # the last token predicts nothing


def _packed(rows: Sequence[Lengths], *, trains: bool) -> Pass:
    inputs = [_inputs(row) for row in rows]
    return Pass(sum(inputs), 0, sum(n * n for n in inputs), sum(row.response for row in rows), trains)


def _padded(rows: Sequence[Lengths], *, trains: bool) -> Pass:
    longest, used = max(map(_inputs, rows)), sum(map(_inputs, rows))
    block = len(rows) * longest
    return Pass(block, block - used, block * longest, block, trains)
