"""Measures a data set before it is trained on: lengths, balance, duplicates, pairing. Not for printing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kto.data.advice import BALANCED, class_balance_warning
from nemo_kto.data.store import TokenStore

PERCENTILES = (50, 90, 95, 99)
_ROUND = 64  # suggested sequence lengths are multiples of it
_COMMON = 0.5  # share of one prompt or response from which partners become rare


@dataclass(frozen=True)
class Lengths:
    """Percentiles (the keys of ``PERCENTILES``), mean and maximum of a column, in tokens."""

    percentiles: dict[str, int]
    mean: float
    max: int


@dataclass(frozen=True)
class Survey:
    """What a data set is like. Shares are fractions of the rows.

    Attributes:
        num_rows: records that can be tokenised.
        num_desirable: liked ones.
        num_undesirable: the others.
        prompt_tokens: lengths of prompts, BOS included.
        response_tokens: lengths of responses, EOS included.
        total_tokens: lengths of whole rows.
        boundary_merges: rows whose tokenizer merges the end of the prompt with the start of the response.
        repeated_rows: rows that repeat an earlier one: prompt, response and label.
        contradictions: pairs of prompt and response that are labelled both ways.
        distinct_prompts: different prompts.
        distinct_responses: different responses.
        longest_prompt_run: neighbours in file order with the same prompt, at most.
        longest_response_run: neighbours in file order with the same response, at most.
        prompt_share: share of the most frequent prompt.
        response_share: share of the most frequent response.
    """

    num_rows: int
    num_desirable: int
    num_undesirable: int
    prompt_tokens: Lengths
    response_tokens: Lengths
    total_tokens: Lengths
    boundary_merges: int
    repeated_rows: int
    contradictions: int
    distinct_prompts: int
    distinct_responses: int
    longest_prompt_run: int
    longest_response_run: int
    prompt_share: float
    response_share: float

    def advice(self) -> list[str]:
        """What to set or to look at, in words."""
        return [*self._length_advice(), *self._balance_advice(), *self._row_advice()]

    def _length_advice(self) -> list[str]:
        total = self.total_tokens
        most, all_rows = _round_up(total.percentiles["p99"]), _round_up(total.max)
        keeps_most = f"model.data.seq_length={most} keeps 99% of the rows whole, " if most < all_rows else ""
        return [f"{keeps_most}model.data.seq_length={all_rows} keeps all"]

    def _balance_advice(self) -> list[str]:
        counts = self.num_desirable, self.num_undesirable
        warning = class_balance_warning(*counts, 1.0, 1.0, "per_batch")
        if warning is None:
            return ["classes are balanced: leave desirable_loss_weight and undesirable_loss_weight at 1"]
        if 0 in counts:
            return [warning]
        ratio = counts[0] / counts[1]
        key = "desirable" if ratio < BALANCED[0] else "undesirable"
        low, high = (b / ratio for b in BALANCED) if ratio < BALANCED[0] else (ratio / b for b in reversed(BALANCED))
        return [
            f"classes are unbalanced ({ratio:.3g} : 1). With loss=kto_paper or apo_zero_unpaired set "
            f"model.kto.{key}_loss_weight between {low:.3g} and {high:.3g}; loss=kto weighs classes alike by itself"
        ]

    def _row_advice(self) -> list[str]:
        advice = []
        if self.repeated_rows:
            advice.append(f"{self.repeated_rows} rows repeat another one; drop them if that was not meant")
        if self.contradictions:
            advice.append(f"{self.contradictions} responses are labelled both desirable and undesirable; settle them")
        for what, share in (("prompt", self.prompt_share), ("response", self.response_share)):
            if share > _COMMON:
                advice.append(f"one {what} makes up {share:.0%} of the rows: many will find no mismatched partner")
        run = max(self.longest_prompt_run, self.longest_response_run)
        if run > 2:
            advice.append(
                f"up to {run} neighbours share a prompt or a response: keep model.data.shuffle=true, or make "
                f"model.global_batch_size larger than {run}, so that all find a mismatched partner"
            )
        return advice


def survey(store: TokenStore) -> Survey:
    """Measure ``store``, which should hold its rows uncut."""
    prompts, responses, desirable = store.prompt_keys, store.response_keys, np.asarray(store.desirable)
    prompt_lengths = np.asarray(store.prompt_lengths)
    total = store.lengths(np.arange(len(store)))
    prompt_ids, response_ids = _ids(prompts), _ids(responses)
    texts = _ids(np.stack([prompt_ids, response_ids], axis=1))
    labelled = np.unique(np.stack([texts, desirable], axis=1), axis=0)
    return Survey(
        num_rows=len(store),
        num_desirable=store.summary.num_desirable,
        num_undesirable=store.summary.num_undesirable,
        prompt_tokens=_lengths(prompt_lengths),
        response_tokens=_lengths(total - prompt_lengths),
        total_tokens=_lengths(total),
        boundary_merges=store.summary.boundary_merges,
        repeated_rows=len(store) - len(labelled),
        contradictions=len(labelled) - int(texts.max()) - 1,
        distinct_prompts=int(prompt_ids.max()) + 1,
        distinct_responses=int(response_ids.max()) + 1,
        longest_prompt_run=_longest_run(prompt_ids),
        longest_response_run=_longest_run(response_ids),
        prompt_share=float(np.bincount(prompt_ids).max()) / len(store),
        response_share=float(np.bincount(response_ids).max()) / len(store),
    )


def _ids(keys: NDArray[Any]) -> NDArray[np.int64]:
    """[n] small integers, equal where the rows of ``keys`` [n, k] are."""
    ids: NDArray[np.int64] = np.unique(np.asarray(keys), axis=0, return_inverse=True)[1].reshape(-1)
    return ids


def _longest_run(ids: NDArray[np.int64]) -> int:
    starts = np.concatenate([[0], np.flatnonzero(np.diff(ids)) + 1, [ids.size]])
    return int(np.diff(starts).max())


def _lengths(column: NDArray[np.int64]) -> Lengths:
    values = np.percentile(column, PERCENTILES, method="higher")
    percentiles = {f"p{p}": int(value) for p, value in zip(PERCENTILES, values, strict=True)}
    return Lengths(percentiles, round(float(column.mean()), 1), int(column.max()))


def _round_up(length: int) -> int:
    return -(-length // _ROUND) * _ROUND
