"""Global batches to tensors: a worked example, and the same global batch whatever the layout."""

from __future__ import annotations

import doctest
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_kit import make_store, random_rows

from nemo_kto.data import collate
from nemo_kto.data.batch import IGNORE, KTOBatch, Rows, StepBatch
from nemo_kto.data.collate import BatchLayout, collate_step
from nemo_kto.objective.counts import BatchCounts
from nemo_kto.objective.pairing import mismatched_partners

LAYOUT = BatchLayout(dp_rank=0, dp_size=1, micro_batch_size=64, pad_id=0, seq_length=32, pad_multiple=1, needs_kl=True)
_ = IGNORE


def unpadded(rows: Rows) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of each row, read back from tokens and labels; pad_id is 0 and no other token is.

    Of a prompt with nothing to score the first token is left.
    """
    if rows.lengths is None:
        pieces = list(zip(rows.tokens, rows.labels, strict=True))
    else:
        assert rows.tokens.shape == rows.labels.shape == (1, sum(rows.lengths))
        cut = [tensor[0].split(list(rows.lengths)) for tensor in (rows.tokens, rows.labels)]
        pieces = list(zip(*cut, strict=True))
    assert len(pieces) == rows.count
    result = []
    for tokens, labels in pieces:
        ids = tokens[tokens != 0].tolist()
        response = labels[labels != IGNORE].tolist()
        prompt = ids[: len(ids) - len(response) + 1] if response else ids
        assert ids == prompt + response[:-1]
        scored = torch.nonzero(labels != IGNORE).flatten().tolist()
        assert scored == list(range(len(prompt) - 1, len(ids))) or not response, "labels are shifted by one"
        assert response or len(ids) == 1
        result.append((prompt, response))
    return result


def flat(steps: list[StepBatch]) -> list[tuple]:
    """One tuple per sample, in the order of the records."""
    samples = []
    for step in steps:
        for batch in step:
            columns = (unpadded(batch.samples), unpadded(batch.kl_rows), batch.desirable.tolist())
            samples += zip(*columns, batch.has_partner.tolist(), batch.index.tolist(), strict=True)
    return sorted(samples, key=lambda sample: sample[-1])


def test_docstring_example():
    outcome = doctest.testmod(collate)
    assert outcome.attempted > 8
    assert outcome.failed == 0


def test_exact_tensors(tmp_path):
    """Two micro-batches on one rank: padding ends with the micro-batch, pairing does not."""
    rows = [([1, 2], [6, 9], True), ([3], [7, 8, 9], False), ([4, 5], [9], True)]
    step = collate_step(make_store(tmp_path / "s", rows), np.array([2, 0, 1]), replace(LAYOUT, micro_batch_size=2))
    first, second = step.micro_batches
    # Global order is rows 2, 0, 1: row 2 takes the response of 0, row 0 that of 1, row 1 that of 2. Inputs, longer of
    # both rows: 3, 4, 3, so that row 0 and, of the rest, row 2 share a micro-batch.
    assert first.samples.tokens.tolist() == [[4, 5, 0], [1, 2, 6]]
    assert first.samples.labels.tolist() == [[_, 9, _], [_, 6, 9]]
    assert first.kl_rows.tokens.tolist() == [[4, 5, 6, 0], [1, 2, 7, 8]]
    assert first.kl_rows.labels.tolist() == [[_, 6, 9, _], [_, 7, 8, 9]]
    assert first.desirable.tolist() == [True, True]
    assert first.has_partner.tolist() == [True, True]
    assert first.index.tolist() == [2, 0]
    assert second.samples.tokens.tolist() == [[3, 7, 8]]
    assert second.kl_rows.tokens.tolist() == [[3]]
    assert second.kl_rows.labels.tolist() == [[9]]
    assert step.counts == BatchCounts(3, 2, 1, 3, 11, num_inputs=16, num_pads=2)


def test_types(tmp_path):
    batch = collate_step(make_store(tmp_path / "s", random_rows(4)), np.arange(4), LAYOUT).micro_batches[0]
    for rows in (batch.samples, batch.kl_rows):
        assert rows.tokens.dtype == rows.labels.dtype == torch.int64
        assert rows.tokens.shape == rows.labels.shape
    assert batch.desirable.dtype == batch.has_partner.dtype == torch.bool
    assert batch.index.dtype == torch.int64
    assert batch.ref_logps is None
    assert batch.ref_kl_logps is None
    assert batch.size == 4


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize(("size", "prompts"), [(16, 3), (13, 10**6), (3, 10**6)])
def test_layouts_share_one_global_batch(tmp_path, dp_size, micro_batch_size, size, prompts, packing):
    store = make_store(tmp_path / "s", random_rows(40, prompts=prompts))
    indices = np.random.default_rng(size).permutation(40)[:size]
    whole = collate_step(store, indices, LAYOUT)
    layout = replace(LAYOUT, dp_size=dp_size, micro_batch_size=micro_batch_size, packing=packing)
    shares = [collate_step(store, indices, replace(layout, dp_rank=rank)) for rank in range(dp_size)]
    assert flat(shares) == flat([whole])
    assert [sample[-1] for sample in flat(shares)] == sorted(indices.tolist())
    assert {replace(share.counts, num_pads=0) for share in shares} == {replace(whole.counts, num_pads=0)}
    rows = [rows for share in shares for batch in share for rows in (batch.samples, batch.kl_rows)]
    positions = sum(entry.tokens.numel() for entry in rows)
    assert {share.counts.num_pads for share in shares} == {positions - whole.counts.num_inputs}
    numbers = [len(share.micro_batches) for share in shares]
    assert max(numbers) - min(numbers) <= 1
    if packing:
        assert all(entry.tokens.numel() <= layout.capacity for entry in rows)
    else:
        assert all(batch.size <= micro_batch_size for share in shares for batch in share)


def test_partners_and_counts_against_the_rows(tmp_path):
    rows = random_rows(30, prompts=4)
    store = make_store(tmp_path / "s", rows)
    indices = np.random.default_rng(1).permutation(30)[:12]
    step = collate_step(store, indices, LAYOUT)
    picked = [rows[i] for i in indices]
    partners = mismatched_partners([tuple(r[0]) for r in picked], [tuple(r[1]) for r in picked])
    found = {sample[-1]: sample for sample in flat([step])}
    for i, (sample, kl, desirable, has_partner, index) in enumerate(found[row] for row in indices):
        assert sample == (picked[i][0], picked[i][1])
        paired = partners[i] is not None
        assert kl == ((picked[i][0], picked[partners[i]][1]) if paired else (picked[i][0][:1], []))
        assert (desirable, has_partner, index) == (picked[i][2], partners[i] is not None, indices[i])
    assert step.counts.num_kl_pairs == sum(m is not None for m in partners)
    assert step.counts.num_desirable == sum(r[2] for r in picked)
    assert step.counts.num_undesirable == 12 - step.counts.num_desirable
    assert step.counts.num_tokens == sum(len(r[0]) + len(r[1]) for r in picked)


def test_same_prompts_have_no_partner(tmp_path):
    store = make_store(tmp_path / "s", [([5, 6], [7], True), ([5, 6], [8, 9], False)])
    step = collate_step(store, np.arange(2), LAYOUT)
    batch = step.micro_batches[0]
    assert batch.has_partner.tolist() == [False, False]
    assert batch.kl_rows.tokens.tolist() == [[5], [5]]
    assert (batch.kl_rows.labels == IGNORE).all()
    assert step.counts.num_kl_pairs == 0


def test_prompts_split_differently_are_still_the_same(tmp_path):
    """A merge at the boundary shortens one of the two prompts: their key says that they are one."""
    rows = [([5], [60, 7], True), ([5, 6], [8, 9], False)]
    alike = make_store(tmp_path / "a", rows, prompt_keys=[1, 1])
    other = make_store(tmp_path / "b", rows, prompt_keys=[1, 2])
    assert collate_step(alike, np.arange(2), LAYOUT).counts.num_kl_pairs == 0
    assert collate_step(other, np.arange(2), LAYOUT).counts.num_kl_pairs == 2


def test_kl_rows_end_at_seq_length(tmp_path):
    rows = [([1] * 6, [2], True), ([3], [4, 5, 6, 7], False), ([8, 9], [10, 11, 12], True)]
    step = collate_step(make_store(tmp_path / "s", rows), np.arange(3), replace(LAYOUT, seq_length=7))
    batch = step.micro_batches[0]
    assert unpadded(batch.kl_rows) == [([1] * 6, [4]), ([3], [10, 11, 12]), ([8, 9], [2])]
    full = collate_step(make_store(tmp_path / "t", rows), np.arange(3), replace(LAYOUT, seq_length=6))
    kl = unpadded(full.micro_batches[0].kl_rows)
    assert kl == [([1], []), ([3], [10, 11, 12]), ([8, 9], [2])], "no room: not counted"
    assert full.micro_batches[0].has_partner.tolist() == [False, True, True]
    assert full.counts.num_kl_pairs == 2


@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_padding(tmp_path, multiple):
    store = make_store(tmp_path / "s", random_rows(12))
    layout = replace(LAYOUT, micro_batch_size=3, pad_multiple=multiple, pad_id=99)
    for batch in collate_step(store, np.arange(12), layout):
        lengths = store.lengths(batch.index.numpy()) - 1
        width = batch.samples.tokens.shape[1]
        assert width == -(-lengths.max() // multiple) * multiple
        assert batch.kl_rows.tokens.shape[1] % multiple == 0
        for tokens, labels, length in zip(batch.samples.tokens, batch.samples.labels, lengths, strict=True):
            assert (tokens[length:] == 99).all()
            assert (labels[length:] == IGNORE).all()


def test_without_kl(tmp_path, monkeypatch):
    store = make_store(tmp_path / "s", random_rows(6))
    monkeypatch.setattr(collate, "mismatched_partners", None)
    step = collate_step(store, np.arange(6), replace(LAYOUT, needs_kl=False))
    batch = step.micro_batches[0]
    assert not batch.has_partner.any()
    assert unpadded(batch.kl_rows) == [(store.prompt(i).tolist()[:1], []) for i in range(6)]
    assert step.counts.num_kl_pairs == 0
    with_kl = replace(LAYOUT, needs_kl=False)
    assert unpadded(batch.samples) == unpadded(collate_step(store, np.arange(6), with_kl).micro_batches[0].samples)


def test_a_rank_may_get_nothing(tmp_path):
    store = make_store(tmp_path / "s", random_rows(2))
    shares = [collate_step(store, np.arange(2), replace(LAYOUT, dp_size=4, dp_rank=rank)) for rank in range(4)]
    assert [len(share.micro_batches) for share in shares] == [1, 1, 0, 0]
    assert {share.counts.num_samples for share in shares} == {2}


def test_tensors_are_the_batch_s_own(tmp_path):
    """Writing to them must not reach the memory map."""
    store = make_store(tmp_path / "s", random_rows(3))
    batch: KTOBatch = collate_step(store, np.arange(3), LAYOUT).micro_batches[0]
    before = store.desirable.tolist()
    batch.desirable.logical_not_()
    batch.samples.tokens.zero_()
    batch.index.zero_()
    assert store.desirable.tolist() == before
    assert store.prompt(0).tolist() != [0] * 5
