"""Reference columns: which rows reach the reference, in which groups, and where its numbers end up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_kto.data.batch import IGNORE, KTOBatch, Rows, StepBatch
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
    return Rows(tokens, torch.full_like(tokens, IGNORE))


def micro_batch(*first: int, width: int = 3) -> KTOBatch:
    """Samples that begin with ``first``; their pairs with 100 more, and a token longer."""
    flags = torch.ones(len(first), dtype=torch.bool)
    pairs = rows(*(token + 100 for token in first), width=width + 1)
    return KTOBatch(rows(*first, width=width), pairs, flags, flags, torch.tensor(first))


def share(*batches: KTOBatch, number: int | None = None, upcoming: tuple[StepBatch, ...] = ()) -> StepBatch:
    return StepBatch(batches, BatchCounts(0, 0, 0, 0, 0), number, upcoming)


def columns(step: StepBatch) -> list[tuple[list[float], list[float]]]:
    return [(b.ref_logps.tolist(), b.ref_kl_logps.tolist()) for b in step]


ODD = share(micro_batch(1, 2), micro_batch(3))


def test_samples_and_pairs_take_one_call_and_keep_their_tensors():
    """The last micro-batch of a validation is smaller; what follows it is not grouped anew for that."""
    told = Told()
    scored = ReferenceColumns(told, micro_batch_size=2, needs_kl=True).score(ODD)
    assert columns(scored) == [([1, 2], [101, 102]), ([3], [103])]
    (asked,) = told.calls
    wanted = [*(b.samples for b in ODD), *(b.kl_rows for b in ODD)]
    assert all(one is other for one, other in zip(asked, wanted, strict=True))


def test_a_larger_forward_takes_samples_and_pairs_apart():
    told = Told()
    step = share(micro_batch(1, 2), micro_batch(3, 4, width=5), micro_batch(5, 6))
    scored = ReferenceColumns(told, micro_batch_size=4, needs_kl=True).score(step)
    assert columns(scored) == [([1, 2], [101, 102]), ([3, 4], [103, 104]), ([5, 6], [105, 106])]
    assert [list(r.tokens.shape) for r in told.calls[0]] == [[4, 5], [2, 3], [4, 6], [2, 4]]


def test_pairs_that_do_not_count_are_not_scored():
    told = Told()
    scored = ReferenceColumns(told, micro_batch_size=2, needs_kl=False).score(ODD)
    assert [(b.ref_logps.tolist(), b.ref_kl_logps) for b in scored] == [([1, 2], None), ([3], None)]
    assert len(told.calls[0]) == 2


@pytest.mark.parametrize("step", [ODD, share()], ids=["rows", "no rows"])
def test_all_ranks_call_and_only_the_last_stage_has_numbers(step):
    told = Told(last_stage=False)
    scored = ReferenceColumns(told, micro_batch_size=2, needs_kl=True).score(step)
    assert len(told.calls) == 1
    assert all(b.ref_logps is None and b.ref_kl_logps is None for b in scored)


def test_a_share_without_rows_has_no_columns():
    assert ReferenceColumns(Told(), micro_batch_size=2, needs_kl=True).score(share()).micro_batches == ()


def steps(first: int, last: int) -> list[StepBatch]:
    """Training steps of two micro-batches, the last one smaller; their tokens tell the step."""
    return [
        share(micro_batch(10 * n + 1, 10 * n + 2), micro_batch(10 * n + 3), number=n) for n in range(first, last + 1)
    ]


def window(first: int, last: int) -> list[StepBatch]:
    """As the loader hands them out: the first brings the others."""
    step, *upcoming = steps(first, last)
    return [replace(step, upcoming=tuple(upcoming)), *upcoming]


def wanted(n: int) -> list[tuple[list[float], list[float]]]:
    tokens = [[10 * n + 1, 10 * n + 2], [10 * n + 3]]
    return [([float(t) for t in part], [float(t + 100) for t in part]) for part in tokens]


def test_a_window_takes_one_call_and_every_step_gets_its_own_numbers():
    told = Told()
    scorer = ReferenceColumns(told, micro_batch_size=2, needs_kl=True)
    scored = [scorer.score(step) for step in [*window(4, 6), *window(7, 8)]]
    assert [columns(step) for step in scored] == [wanted(n) for n in range(4, 9)]
    assert [len(call) for call in told.calls] == [12, 8]
    assert all(step.upcoming == () for step in scored)
    assert scorer._ahead == {}


def test_a_validation_in_the_middle_of_a_window_disturbs_nothing():
    told = Told()
    scorer = ReferenceColumns(told, micro_batch_size=2, needs_kl=True)
    first, second, third = window(0, 2)
    scorer.score(first)
    assert columns(scorer.score(ODD)) == [([1, 2], [101, 102]), ([3], [103])]
    assert columns(scorer.score(second)) == wanted(1)
    scorer.score(ODD)
    assert columns(scorer.score(third)) == wanted(2)
    assert [len(call) for call in told.calls] == [12, 4, 4]


def test_windows_may_begin_anywhere():
    """A loader that begins anew (a run that is resumed in the same process) may cut its windows elsewhere."""
    told = Told()
    scorer = ReferenceColumns(told, micro_batch_size=2, needs_kl=True)
    scorer.score(window(0, 2)[0])
    begun_anew = [columns(scorer.score(step)) for step in [*window(4, 5), *window(6, 6)]]
    assert begun_anew == [wanted(4), wanted(5), wanted(6)]
    assert scorer._ahead == {}, "what never came is not kept for ever"
    assert len(told.calls) == 3


def test_other_stages_do_not_ask_again_either():
    told = Told(last_stage=False)
    scorer = ReferenceColumns(told, micro_batch_size=2, needs_kl=True)
    for step in window(0, 2):
        assert all(b.ref_logps is None for b in scorer.score(step))
    assert len(told.calls) == 1


def test_upcoming_steps_move_to_the_device_too():
    step = window(0, 2)[0].to(torch.device("meta"))
    assert [s.number for s in (step, *step.upcoming)] == [0, 1, 2]
    assert all(b.samples.tokens.is_meta for s in step.upcoming for b in s)
