"""Reference columns: which rows reach the reference, in which groups, and where its numbers end up."""

from __future__ import annotations

import pytest
import torch

from nemo_kto.data.batch import ForwardSize, KTOBatch, Rows, StepBatch
from nemo_kto.objective.counts import BatchCounts
from nemo_kto.reference.columns import ReferenceColumns


class Told:
    """A reference that says of each row its first token, and remembers what it was asked."""

    def __init__(self, *, last_stage: bool = True) -> None:
        self.calls: list[list[Rows]] = []
        self._last_stage = last_stage

    def log_probs(self, rows):
        self.calls.append(list(rows))
        return [r.tokens[:, 0].double() for r in rows] if self._last_stage else []


def rows(*first: int, width: int = 3) -> Rows:
    tokens = torch.tensor(first)[:, None].expand(-1, width).clone()
    return Rows(tokens, torch.zeros_like(tokens))


def micro_batch(*first: int, width: int = 3) -> KTOBatch:
    """Samples that begin with ``first``; their pairs with 100 more, and a token longer."""
    flags = torch.ones(len(first), dtype=torch.bool)
    pairs = rows(*(token + 100 for token in first), width=width + 1)
    return KTOBatch(rows(*first, width=width), pairs, flags, flags, torch.tensor(first))


def share(*batches: KTOBatch) -> StepBatch:
    return StepBatch(batches, BatchCounts(0, 0, 0, 0, 0))


def columns(step: StepBatch) -> list[tuple[list[float], list[float]]]:
    return [(b.ref_logps.tolist(), b.ref_kl_logps.tolist()) for b in step]


ODD = share(micro_batch(1, 2), micro_batch(3))


def test_samples_and_pairs_take_one_call_and_keep_their_tensors():
    """The last micro-batch of a validation is smaller; what follows it is not grouped anew for that."""
    told = Told()
    scored = ReferenceColumns(told, size=None, needs_kl=True).score(ODD)
    assert columns(scored) == [([1, 2], [101, 102]), ([3], [103])]
    (asked,) = told.calls
    wanted = [*(b.samples for b in ODD), *(b.kl_rows for b in ODD)]
    assert all(one is other for one, other in zip(asked, wanted, strict=True))


def test_a_larger_forward_takes_samples_and_pairs_apart():
    told = Told()
    step = share(micro_batch(1, 2), micro_batch(3, 4, width=5), micro_batch(5, 6))
    scored = ReferenceColumns(told, size=ForwardSize(4), needs_kl=True).score(step)
    assert columns(scored) == [([1, 2], [101, 102]), ([3, 4], [103, 104]), ([5, 6], [105, 106])]
    assert [list(r.tokens.shape) for r in told.calls[0]] == [[4, 5], [2, 3], [4, 6], [2, 4]]


def test_pairs_that_do_not_count_are_not_scored():
    told = Told()
    scored = ReferenceColumns(told, size=None, needs_kl=False).score(ODD)
    assert [(b.ref_logps.tolist(), b.ref_kl_logps) for b in scored] == [([1, 2], None), ([3], None)]
    assert len(told.calls[0]) == 2


@pytest.mark.parametrize("step", [ODD, share()], ids=["rows", "no rows"])
def test_all_ranks_call_and_only_the_last_stage_has_numbers(step):
    told = Told(last_stage=False)
    scored = ReferenceColumns(told, size=None, needs_kl=True).score(step)
    assert len(told.calls) == 1
    assert all(b.ref_logps is None and b.ref_kl_logps is None for b in scored)


def test_a_share_without_rows_has_no_columns():
    assert ReferenceColumns(Told(), size=None, needs_kl=True).score(share()).micro_batches == ()
