"""From texts to tensors nothing is lost, whatever the texts, the layout and the batch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import fuzz_kit  # noqa: F401 - how to search
import numpy as np
import pytest
import tiny
import torch
from data_kit import char_tokenizer, make_store
from hypothesis import given
from hypothesis import strategies as st

from nemo_kto.data.batch import IGNORE, ForwardSize, KTOBatch, Rows, regroup, split_rows
from nemo_kto.data.collate import BatchLayout, collate_step
from nemo_kto.data.encode import Encoder, EncodeSettings
from nemo_kto.data.records import Message, Record
from nemo_kto.data.store import TokenStore

PAD = 0
WHOLE = st.characters(exclude_categories=["Cs"])
TEXT = st.text(WHOLE, min_size=1, max_size=12).filter(str.strip)
SIMPLE = st.text(st.sampled_from("ab cd$^\n"), min_size=1, max_size=12).filter(str.strip)
"""Letters that the character tokenizer merges, its BOS and EOS among them."""


# --- tokens


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory) -> Path:
    """Loses no byte: what is decoded is what was encoded."""
    out = tmp_path_factory.mktemp("bytes")
    tiny.make_tokenizer(out)
    return out


@pytest.fixture(scope="module")
def characters(tmp_path_factory) -> dict[tuple[bool, bool], Encoder]:
    """By (adds a BOS, appends EOS). Merges "bc" and "ab", so that tokens span prompt and response."""
    made = {}
    for bos in (False, True):
        folder = char_tokenizer(
            tmp_path_factory.mktemp("characters"), bos="^" if bos else None, merges=[("b", "c"), ("a", "b")]
        )
        for append in (False, True):
            made[bos, append] = Encoder(folder, EncodeSettings(10_000, append, "error"))
    return made


@pytest.fixture(scope="module")
def encoder(bytes_tokenizer) -> Encoder:
    return Encoder(bytes_tokenizer, EncodeSettings(10_000, True, "error"))


def _one_row(encoder: Encoder, record: Record) -> tuple[list[int], list[int]]:
    chunk = encoder.encode([record], 0)
    assert chunk.problems == ()
    assert (chunk.dropped_overlong, chunk.truncated, chunk.lengths.size) == (0, 0, 1)
    assert chunk.ids.size == chunk.lengths[0]
    cut = int(chunk.prompt_lengths[0])
    return chunk.ids[:cut].tolist(), chunk.ids[cut:].tolist()


@given(prompt=TEXT, response=TEXT)
def test_no_byte_of_a_text_is_lost(encoder, prompt, response):
    tokenizer = encoder._tokenizer
    prompt_ids, response_ids = _one_row(encoder, Record(prompt, response, True))
    assert prompt_ids
    assert response_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(prompt_ids + response_ids[:-1]) == prompt + response


@given(prompt=SIMPLE, response=SIMPLE, bos=st.booleans(), append=st.booleans())
def test_ids_are_those_of_the_whole_text(characters, prompt, response, bos, append):
    """One BOS, one EOS, and between them the tokenizer's own ids of prompt + response, cut where the prompt ends."""
    encoder = characters[bos, append]
    prompt_ids, response_ids = _one_row(encoder, Record(prompt, response, True))
    decode, eos = encoder._tokenizer.decode, ord("$")
    ids, text = prompt_ids + response_ids, prompt + response
    if bos:
        assert ids[0] == ord("^")
        ids, text = ids[1:], text.removeprefix("^")
    if append:
        # an EOS that is there stays, and white space behind it goes; else one is appended
        stripped = response.rstrip()
        closed = stripped.endswith("$") and len(response) - len(stripped) <= 4
        assert response_ids[-1] == eos
        text = text.rstrip() if closed else text + "$"
    assert decode(ids) == text
    assert prompt_ids
    assert response_ids
    # the prompt's share never reaches into the response
    assert (prompt if not bos or prompt.startswith("^") else f"^{prompt}").startswith(decode(prompt_ids))


@given(turns=st.lists(TEXT, min_size=1, max_size=3), response=TEXT)
def test_a_chat_is_its_template(encoder, turns, response):
    messages = tuple(Message("user", text) for text in turns)
    prompt_ids, response_ids = _one_row(encoder, Record(messages, response, True))
    decode = encoder._tokenizer.decode
    asked = "".join(f"<|im_start|>user\n{text}<|im_end|>\n" for text in turns) + "<|im_start|>assistant\n"
    whole = f"{asked}{response}<|im_end|>"
    assert decode(prompt_ids + response_ids) == whole
    assert asked.startswith(decode(prompt_ids).rstrip("\ufffd")), "the prompt's share ends with the prompt, or before"


@given(
    records=st.lists(st.tuples(SIMPLE, SIMPLE, st.booleans()), min_size=1, max_size=6),
    limit=st.integers(2, 14),
    overlong=st.sampled_from(["drop", "truncate", "error"]),
)
def test_every_record_is_kept_cut_dropped_or_named(characters, records, limit, overlong):
    whole = characters[False, True]
    rows = [_one_row(whole, Record(*record)) for record in records]
    encoder = object.__new__(Encoder)
    encoder.__dict__.update(whole.__dict__, _settings=EncodeSettings(limit, True, overlong))
    chunk = encoder.encode([Record(*record, "f.jsonl", 7 + i) for i, record in enumerate(records)], 100)
    fates = [_fate(row, limit, overlong) for row in rows]
    kept = [i for i, fate in enumerate(fates) if fate in ("whole", "cut")]
    assert chunk.record_index.tolist() == [100 + i for i in kept]
    assert chunk.desirable.tolist() == [records[i][2] for i in kept]
    assert chunk.ids.tolist() == [token for i in kept for token in (rows[i][0] + rows[i][1])[:limit]]
    assert (chunk.truncated, chunk.dropped_overlong) == (fates.count("cut"), fates.count("dropped"))
    assert [where for where, _ in chunk.problems] == [
        f"f.jsonl:{7 + i}" for i, fate in enumerate(fates) if fate == "named"
    ]


def _fate(row: tuple[list[int], list[int]], limit: int, overlong: str) -> str:
    if len(row[0]) + len(row[1]) <= limit:
        return "whole"
    if overlong == "error":
        return "named"
    return "cut" if overlong == "truncate" and len(row[0]) < limit else "dropped"


# --- tensors


@st.composite
def global_batches(draw: Any) -> tuple[list[tuple[list[int], list[int], bool]], list[int], dict[str, int]]:
    """Rows of a store, the global batch's choice of them, and everything of a layout but the rank."""
    ids = st.lists(st.integers(1, 5), min_size=1, max_size=6)
    rows = draw(st.lists(st.tuples(ids, ids, st.booleans()), min_size=2, max_size=9))
    order = draw(st.permutations(range(len(rows))))
    longest = max(len(prompt) + len(response) for prompt, response, _ in rows)
    layout = {
        "dp_size": draw(st.integers(1, 4)),
        "micro_batch_size": draw(st.integers(1, 4)),
        "pad_id": PAD,
        "seq_length": draw(st.integers(longest, longest + 3)),
        "pad_multiple": draw(st.sampled_from([1, 2, 4])),
        "needs_kl": draw(st.booleans()),
        "packing": draw(st.booleans()),
        "stages": draw(st.integers(1, 3)),
    }
    return rows, order[: draw(st.integers(1, len(rows)))], layout


def _row(prompt: list[int], response: list[int]) -> tuple[list[int], list[int]]:
    """Tokens and labels by the definition in data/batch.py, without padding."""
    tokens = prompt + response
    if not response:
        return tokens[:1], [IGNORE]
    return tokens[:-1], [tokens[t + 1] if t + 1 >= len(prompt) else IGNORE for t in range(len(tokens) - 1)]


def _check_rows(found: Rows, wanted: list[tuple[list[int], list[int]]], multiple: int, packing: bool) -> None:
    rows = [_row(*row) for row in wanted]
    lengths = [len(tokens) for tokens, _ in rows]
    needed = sum(lengths) if packing else max(lengths)
    width = found.tokens.size(1)
    assert width % multiple == 0
    assert needed <= width < needed + multiple
    if packing:
        assert found.lengths == (*lengths[:-1], lengths[-1] + width - needed)
        rows = [tuple([item for row in rows for item in row[part]] for part in (0, 1))]
    else:
        assert found.lengths is None
    assert found.tokens.tolist() == [tokens + [PAD] * (width - len(tokens)) for tokens, _ in rows]
    assert found.labels.tolist() == [labels + [IGNORE] * (width - len(labels)) for _, labels in rows]
    assert found.tokens.dtype == found.labels.dtype == torch.int64
    assert found.num_response_tokens.tolist() == [len(response) for _, response in wanted]
    assert found.row_of_position.shape == found.tokens.shape
    _check_cut_anew(found, [_row(*row) for row in wanted])


def _check_cut_anew(found: Rows, rows: list[tuple[list[int], list[int]]]) -> None:
    """Taken apart and put together in both ways, rows are the rows they were."""
    pieces = split_rows([found])
    assert [(p.tokens[0].tolist(), p.labels[0].tolist()) for p in pieces] == rows
    for size in (ForwardSize(2), ForwardSize(2, tokens=5), ForwardSize(9, tokens=99, multiple=4)):
        again = regroup([found, found], size)
        assert all(entry.tokens.size(1) % size.multiple == 0 for entry in again)
        if size.tokens is None:
            assert all(entry.count <= size.rows for entry in again)
        else:
            assert all(entry.count == 1 or sum(map(len, _inputs(entry))) <= size.tokens for entry in again)
        assert [row for entry in again for row in _inputs(entry)] == [tokens for tokens, _ in rows + rows]


def _inputs(entry: Rows) -> list[list[int]]:
    return [piece.tokens[0].tolist() for piece in split_rows([entry])]


@given(case=global_batches())
def test_shares_partition_the_batch_and_every_row_is_whole(case):
    rows, order, sizes = case
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", rows)
        _check_batch(store, rows, order, sizes)


def _check_batch(store: TokenStore, rows: list, order: list[int], sizes: dict[str, int]) -> None:
    steps = [
        collate_step(store, np.array(order), BatchLayout(dp_rank=rank, **sizes)) for rank in range(sizes["dp_size"])
    ]
    shares = [[int(i) for batch in step for i in batch.index] for step in steps]
    assert sorted(i for share in shares for i in share) == sorted(order), "every sample once, on one rank"
    numbers = [len(step.micro_batches) for step in steps]
    assert max(numbers) - min(numbers) <= 1
    if sizes["packing"]:
        assert sum(numbers) >= min(sizes["stages"] * sizes["dp_size"], len(order))
    partners = _partners(rows, order) if sizes["needs_kl"] else dict.fromkeys(order)
    partners = {i: m if len(rows[i][0]) < sizes["seq_length"] else None for i, m in partners.items()}
    for step in steps:
        assert sizes["packing"] or all(batch.size <= sizes["micro_batch_size"] for batch in step.micro_batches)
        for batch in step:
            _check_micro_batch(batch, rows, partners, sizes)
        assert step.counts == steps[0].counts
    counts = steps[0].counts
    liked = sum(rows[i][2] for i in order)
    assert (counts.num_samples, counts.num_desirable, counts.num_undesirable) == (
        len(order),
        liked,
        len(order) - liked,
    )
    assert counts.num_kl_pairs == sum(m is not None for m in partners.values())
    assert counts.num_tokens == sum(len(rows[i][0]) + len(rows[i][1]) for i in order)


def _check_micro_batch(batch: KTOBatch, rows: list, partners: dict[int, int | None], sizes: dict[str, int]) -> None:
    mine = batch.index.tolist()
    assert batch.desirable.tolist() == [rows[i][2] for i in mine]
    assert batch.has_partner.tolist() == [partners[i] is not None for i in mine]
    _check_rows(batch.samples, [rows[i][:2] for i in mine], sizes["pad_multiple"], sizes["packing"])
    pairs = []
    for i in mine:
        prompt, foreign = rows[i][0], rows[partners[i]][1] if partners[i] is not None else []
        pairs.append((prompt, foreign[: sizes["seq_length"] - len(prompt)]))
    _check_rows(batch.kl_rows, pairs, sizes["pad_multiple"], sizes["packing"])


def _partners(rows: list, order: list[int]) -> dict[int, int | None]:
    """For each sample the next one of the global batch that differs in both, by looking at all of them."""
    found = {}
    for place, i in enumerate(order):
        others = [order[(place + d) % len(order)] for d in range(1, len(order))]
        fits = (m for m in others if rows[m][0] != rows[i][0] and rows[m][1] != rows[i][1])
        found[i] = next(fits, None)
    return found
