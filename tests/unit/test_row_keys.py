"""Keys of rows: equal where prompt and response are, whatever stands around them, and different otherwise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from data_kit import make_store, random_rows

from nemo_kto.data.batch import IGNORE, Rows, split_rows
from nemo_kto.data.collate import BatchLayout, collate_step
from nemo_kto.reference.cache_identity import CacheIdentity
from nemo_kto.reference.row_keys import row_key


def row(prompt: list[int], response: list[int], padding: int = 0, pad_id: int = 0) -> Rows:
    tokens = [*prompt, *response, *[pad_id] * padding]
    labels = [IGNORE] * (len(prompt) - 1) + response + [IGNORE] * (padding + 1)
    return Rows(torch.tensor([tokens]), torch.tensor([labels]))


def test_every_split_of_every_short_sequence_has_a_key_of_its_own():
    keys = set()
    count = 0
    for size in range(2, 7):
        for ids in itertools.product([0, 1, 2], repeat=size):
            for cut in range(1, size):
                keys.add(row_key(row(list(ids[:cut]), list(ids[cut:]))).key)
                count += 1
    assert len(keys) == count == sum(3**size * (size - 1) for size in range(2, 7))


def test_padding_is_no_part_of_it():
    plain = row_key(row([5, 6], [7, 8, 9]))
    assert plain.num_tokens == 3
    assert row_key(row([5, 6], [7, 8, 9], padding=4)) == plain
    assert row_key(row([5, 6], [7, 8, 9], padding=4, pad_id=9)) == plain


def test_ids_that_are_as_large_as_they_come():
    assert row_key(row([1 << 31, 2], [3])).key != row_key(row([0, 2], [3])).key


def test_nothing_to_score_is_no_key():
    assert row_key(row([5, 6], [])) is None


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_batches_of_any_layout_have_the_same_keys(tmp_path, micro, packing):
    store = make_store(tmp_path / "s", random_rows(8))
    found = {}
    for rank in range(2):
        layout = BatchLayout(rank, 2, micro, 0, 64, 4, needs_kl=True, packing=packing)
        for batch in collate_step(store, np.arange(8), layout):
            for rows in (batch.samples, batch.kl_rows):
                for index, single in zip(batch.index.tolist(), split_rows([rows]), strict=True):
                    found[index, rows is batch.samples] = row_key(single)
    for i in range(8):
        assert found[i, True] == row_key(row(store.prompt(i).tolist(), store.response(i).tolist()))
        assert found[i, False] == row_key(row(store.prompt(i).tolist(), store.response((i + 1) % 8).tolist()))


def test_split_rows_gives_views():
    rows = Rows(torch.arange(6).view(2, 3), torch.zeros((2, 3), dtype=torch.int64))
    first, second = split_rows([rows])
    assert second.tokens.tolist() == [[3, 4, 5]]
    assert first.tokens.data_ptr() == rows.tokens.data_ptr()


def test_any_change_of_a_reference_is_another_folder():
    base = CacheIdentity("aa", "bf16", {"num_layers": 2, "rope": 1e4})
    others = [
        CacheIdentity("ab", "bf16", {"num_layers": 2, "rope": 1e4}),
        CacheIdentity("aa", "fp32", {"num_layers": 2, "rope": 1e4}),
        CacheIdentity("aa", "bf16", {"num_layers": 2, "rope": 1e5}),
        CacheIdentity("aa", "bf16", {"num_layers": 2, "rope": 1e4}, version=2),
    ]
    assert len({identity.folder("cache") for identity in [base, *others]}) == 5
    assert base.folder("cache") == CacheIdentity("aa", "bf16", {"rope": 1e4, "num_layers": 2}).folder("cache")
    assert len(base.digest) == 32
