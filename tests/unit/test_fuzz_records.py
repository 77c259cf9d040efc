"""Any file of records: read whole and right, or refused by file and line. Never another exception, never in part."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import fuzz_kit  # noqa: F401 - how to search
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from nemo_kto.data.problems import MAX_LISTED
from nemo_kto.data.records import ROLES, Message, Record, read_records
from nemo_kto.errors import DataError

SUFFIXES = ("jsonl", "jsonl.gz", "parquet")
WHOLE = st.characters(exclude_categories=["Cs"])
"""Surrogates are no characters: no tokenizer takes them, and UTF-8 cannot hold them."""
TEXT = st.text(WHOLE, min_size=1, max_size=20).filter(str.strip)
LABELS = {True: ("chosen", 1, True, 1.0), False: ("rejected", 0, False, 0.0)}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("records")


def read_or_refuse(path: Path) -> list[Record] | list[int]:
    """The records of a file, or the numbers of the lines that its error names."""
    try:
        records = read_records([path])
    except DataError as error:
        title, *lines = str(error).splitlines()
        assert re.fullmatch(r"the data cannot be used; problems \(\d+\):", title)
        for line in lines[:MAX_LISTED]:
            assert line.startswith(f"  {path}:"), line
        return [int(found[1]) for line in lines if (found := re.match(rf"  {re.escape(str(path))}:(\d+): ", line))]
    for record in records:
        assert isinstance(record.desirable, bool)
        assert record.where.startswith(f"{path}:")
        for text in (record.prompt, record.response):
            assert "".join([text] if isinstance(text, str) else [m.content for m in text]).strip()
    return records


@given(data=st.binary(max_size=200), suffix=st.sampled_from(SUFFIXES))
def test_any_bytes(here, data, suffix):
    path = here / f"bytes.{suffix}"
    path.write_bytes(data)
    read_or_refuse(path)


@given(lines=st.lists(st.binary(max_size=40), max_size=5), cut=st.integers(0, 30), flip=st.integers(0, 200))
def test_any_damage_to_a_gzip_stream(here, lines, cut, flip):
    data = bytearray(gzip.compress(b"\n".join(lines)))
    data[flip % len(data)] ^= 0xFF
    path = here / "damaged.jsonl.gz"
    path.write_bytes(data[: len(data) - cut])
    read_or_refuse(path)


@given(cut=st.integers(0, 60), places=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4))
def test_any_damage_to_a_parquet_file(here, cut, places):
    path = here / "damaged.parquet"
    table = {"prompt": ["a", "b"], "response": ["c", "d"], "preference": ["chosen", "rejected"]}
    parquet.write_table(pyarrow.table(table), path)
    data = bytearray(path.read_bytes())
    for place, change in places:
        data[place % len(data)] ^= change
    path.write_bytes(data[: len(data) - cut])
    read_or_refuse(path)


@given(values=st.lists(ANY_JSON, min_size=1, max_size=4))
def test_any_json(here, values):
    path = here / "values.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    read_or_refuse(path)


# --- what is right


def _message(role: str | None = None) -> st.SearchStrategy[dict[str, str]]:
    roles = st.sampled_from(ROLES) if role is None else st.just(role)
    return st.fixed_dictionaries({"role": roles, "content": TEXT})


@st.composite
def chats(draw: Any) -> list[dict[str, str]]:
    """A prompt of messages, of which the last is not the assistant's."""
    first = draw(st.lists(_message(), max_size=2))
    return [*first, draw(_message(draw(st.sampled_from([role for role in ROLES if role != "assistant"]))))]


def _expected(text: str | list[dict[str, str]]) -> str | tuple[Message, ...]:
    return text if isinstance(text, str) else tuple(Message(m["role"], m["content"]) for m in text)


@st.composite
def spelled(draw: Any) -> tuple[dict[str, Any], Record]:
    """A record as a file may spell it, and what it means."""
    prompt = draw(TEXT | chats())
    replies = TEXT if isinstance(prompt, str) else TEXT | st.lists(_message("assistant"), min_size=1, max_size=2)
    response, desirable = draw(replies), draw(st.booleans())
    keys = draw(st.sampled_from([("prompt", "response", "preference"), ("prompt", "completion", "label")]))
    raw = dict(zip(keys, (prompt, response, draw(st.sampled_from(LABELS[desirable]))), strict=True))
    if draw(st.booleans()):
        raw["source"] = draw(ANY_JSON)  # other keys are the owner's
    order = draw(st.permutations(list(raw)))
    return {key: raw[key] for key in order}, Record(_expected(prompt), _expected(response), desirable)


def _is_json(value: object) -> bool:
    """Whether a value survives json.dumps as JSON: no NaN, no infinity, no half surrogate."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


@given(
    records=st.lists(spelled().filter(lambda pair: _is_json(pair[0])), min_size=1, max_size=4),
    ascii_only=st.booleans(),
    blank=st.integers(0, 2),
    bom=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
    suffix=st.sampled_from(SUFFIXES[:2]),
)
def test_a_record_survives_in_every_spelling(here, records, ascii_only, blank, bom, end, suffix):
    lines = [json.dumps(raw, ensure_ascii=ascii_only) for raw, _ in records]
    text = end.join([*[""] * blank, *lines])
    data = b"\xef\xbb\xbf" * bom + text.encode("utf-8", "surrogatepass" if ascii_only else "replace")
    path = here / f"whole.{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    found = read_records([path])
    assert found == [record for _, record in records]
    assert [record.number for record in found] == [blank + i for i in range(1, len(records) + 1)]


@given(records=st.lists(spelled(), min_size=1, max_size=4), trl=st.booleans())
def test_a_record_survives_parquet(here, records, trl):
    keys = ("prompt", "completion", "label") if trl else ("prompt", "response", "preference")
    plain = [record for _, record in records if isinstance(record.prompt, str)]
    if not plain:
        return
    rows = [(r.prompt, r.response, r.desirable if trl else ("rejected", "chosen")[r.desirable]) for r in plain]
    path = here / "whole.parquet"
    parquet.write_table(pyarrow.table(dict(zip(keys, map(list, zip(*rows, strict=True)), strict=True))), path)
    assert read_records([path]) == plain


@given(lines=st.lists(st.sampled_from(["good", "blank", "bad json", "bad label", "no key"]), min_size=1, max_size=30))
def test_exactly_the_bad_lines_are_named(here, lines):
    good = {"prompt": "a", "response": "b", "preference": "chosen"}
    texts = {
        "good": json.dumps(good),
        "blank": "  ",
        "bad json": "{",
        "bad label": json.dumps({**good, "preference": 2}),
        "no key": json.dumps({"prompt": "a"}),
    }
    path = here / "mixed.jsonl"
    path.write_text("".join(texts[kind] + "\n" for kind in lines))
    found = read_or_refuse(path)
    bad = [number for number, kind in enumerate(lines, 1) if kind not in ("good", "blank")]
    if bad:
        assert found == bad[:MAX_LISTED]
    elif "good" in lines:
        assert [record.number for record in found] == [n for n, kind in enumerate(lines, 1) if kind == "good"]
    else:
        assert found == [], "a file of blank lines is refused as a whole"
