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
    """Operations over those of NeMo-Aligner's algorithm for one batch, one saving after the other."""

    forward_pairs: float
    """Mismatched pairs without their backward pass."""
    responses: float
    """And the vocabulary projection at response positions alone."""
    swap: float
    """And packed, without padding: ours."""
    cached: float
    """And no reference pass, since its log-probs are known: ours with a cache."""


def read_lengths(data: Path, model: Path) -> list[Lengths]:
    """Lengths of the records of ``data`` (JSON lines of prompt and completion) under a model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    prompts = tokenizer([record["prompt"] for record in records])["input_ids"]
    whole = tokenizer([record["prompt"] + record["completion"] for record in records])["input_ids"]
    return [Lengths(len(p), len(w) - len(p) + 1) for p, w in zip(prompts, whole, strict=True)]


def ratios(lengths: Sequence[Lengths], shape: Shape, rows: int) -> Iterator[Ratios]:
    """For each whole batch of ``rows`` records; the padded ones have one length for samples and pairs."""
    for start in range(0, len(lengths) - rows + 1, rows):
        samples = lengths[start : start + rows]
        partners = samples[1:] + samples[:1]
        pairs = [Lengths(own.prompt, other.response) for own, other in zip(samples, partners, strict=True)]
        longest = max(map(_inputs, [*samples, *pairs]))

        def operations(*runs: Pass) -> float:
            return step_flops(shape, runs)

        def padded(rows: Sequence[Lengths], *, trains: bool, everywhere: bool, width: int = longest) -> Pass:
            block = len(rows) * width
            scored = block if everywhere else sum(row.response for row in rows)
            return Pass(block, block - sum(map(_inputs, rows)), block * width, scored, trains)

        both = [*samples, *pairs]
        theirs = operations(*(padded(both, trains=trains, everywhere=True) for trains in (True, False)))
        forward_pairs, responses = (
            operations(
                padded(samples, trains=True, everywhere=everywhere),
                padded(pairs, trains=False, everywhere=everywhere),
                padded(both, trains=False, everywhere=everywhere),
            )
            for everywhere in (True, False)
        )
        cached = operations(_packed(samples, trains=True), _packed(pairs, trains=False))
        swap = cached + operations(_packed(both, trains=False))
        yield Ratios(forward_pairs / theirs, responses / theirs, swap / theirs, cached / theirs)


def _inputs(row: Lengths) -> int:
    return row.prompt + row.response - 1  # the last token predicts nothing


def _packed(rows: Sequence[Lengths], *, trains: bool) -> Pass:
    inputs = [_inputs(row) for row in rows]
    return Pass(sum(inputs), 0, sum(n * n for n in inputs), sum(row.response for row in rows), trains)
