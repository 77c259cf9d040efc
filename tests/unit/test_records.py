"""Files to records: every spelling that is accepted, and every way to be wrong with its place and the way out."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from nemo_kto.data.records import Message, Record, iter_records, read_records
from nemo_kto.errors import DataError

GOOD = b'{"prompt": "p", "response": "r", "preference": "chosen"}\n'
USER = [{"role": "user", "content": "hi"}]
ANSWER = [{"role": "assistant", "content": "hello"}]
WANT_KEYS = "want prompt, response and preference, or prompt, completion and label"
WANT_LABEL = 'want "chosen", "rejected", 1, 0, true or false'


def error_of(*files: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_records(files)
    return str(caught.value)


def record(**changes: object) -> bytes:
    values = {"prompt": "p", "response": "r", "preference": "chosen", **changes}
    return json.dumps({k: v for k, v in values.items() if v != "ABSENT"}).encode()


@pytest.mark.parametrize(
    ("value", "expected"),
    [("chosen", True), ("rejected", False), (1, True), (0, False), (True, True), (False, False), (1.0, True)],
)
@pytest.mark.parametrize(("response_key", "label_key"), [("response", "preference"), ("completion", "label")])
def test_spellings(tmp_path, value, expected, response_key, label_key):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "p", response_key: "r", label_key: value, "id": 7}))
    assert read_records([path]) == [Record("p", "r", expected)]


def test_chat(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(record(prompt=USER, response=ANSWER) + b"\n" + record(prompt=USER, response="hello"))
    user = (Message("user", "hi"),)
    assert read_records([path]) == [
        Record(user, (Message("assistant", "hello"),), True),
        Record(user, "hello", True),
    ]


def test_blank_lines_bom_and_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n  \r\n" + GOOD.replace(b"\n", b"\r\n") + GOOD.strip())
    assert [r.where for r in read_records([path])] == [f"{path}:1", f"{path}:4", f"{path}:5"]


def test_gzip_and_parquet_equal_jsonl(tmp_path):
    rows = [{"prompt": f"p{i}", "response": f"räß{i}", "preference": i % 2} for i in range(3000)]
    plain, zipped, columns = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz", tmp_path / "a.parquet"
    text = "\n".join(map(json.dumps, rows))
    plain.write_text(text)
    zipped.write_bytes(gzip.compress(text.encode()))
    parquet.write_table(pa.Table.from_pylist(rows), columns)
    assert read_records([plain]) == read_records([zipped]) == read_records([columns])
    assert read_records([columns])[2500].where == f"{columns}:row 2501"


def test_parquet_with_chat_and_floats(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist([{"prompt": USER, "completion": ANSWER, "label": 1.0, "score": float("nan")}])
    parquet.write_table(table, path)
    assert read_records([path]) == [Record((Message("user", "hi"),), (Message("assistant", "hello"),), True)]


BAD_LINES = {
    "not json": (b"{'prompt': 1}", "not JSON (", "want one JSON object per line"),
    "cut off": (b'{"prompt": "p", "resp', "not JSON (", "want one JSON object per line"),
    "two on a line": (GOOD.strip() + GOOD.strip(), "Extra data at column", "want one JSON object per line"),
    "list": (b"[1, 2]", "is a list", "want a JSON object"),
    "string": (b'"prompt"', "is a string", "want a JSON object"),
    "utf-8": (b'{"prompt": "\xff", "response": "r", "preference": 1}', "byte 13 ", "want UTF-8"),
    "nan": (record(preference=float("nan")), "NaN is not a JSON value", "want one JSON"),
    "huge integer": (b'{"prompt": "p", "response": "r", "preference": ' + b"1" * 5000 + b"}", "not JSON", "want one"),
    "nested": (b"[" * 100_000, "not JSON", "want one JSON object per line"),
    "doubled key": (b'{"prompt": "a", "prompt": "b", "response": "r", "preference": 1}', "'prompt' appears twice", ""),
    "no prompt": (record(prompt="ABSENT"), "has no prompt", WANT_KEYS),
    "no response": (record(response="ABSENT"), "has no response", WANT_KEYS),
    "no label": (record(preference="ABSENT"), "has no preference", WANT_KEYS),
    "nothing": (b"{}", "has no prompt and no response and no preference", WANT_KEYS),
    "half TRL": (b'{"prompt": "p", "completion": "r"}', "has no label", WANT_KEYS),
    "paired": (b'{"prompt": "p", "chosen": "a", "rejected": "b"}', "split the pair into two records", WANT_KEYS),
    "mixed": (record(preference="ABSENT", label=True), "mixes two spellings (response, label)", WANT_KEYS),
    "both": (record(completion="r"), "mixes two spellings (response, preference, completion)", WANT_KEYS),
    "prompt number": (record(prompt=3), "prompt is a number", "want a string or a list of chat messages"),
    "response null": (record(response=None), "response is null", "want a string or a list of chat messages"),
    "prompt object": (record(prompt={}), "prompt is an object", "want a string or a list of chat messages"),
    "empty prompt": (record(prompt=""), "prompt is empty", "want text, for a response is judged given its prompt"),
    "blank prompt": (record(prompt=" \n"), "prompt is empty", "want text"),
    "empty response": (record(response=""), "response is empty", "an empty response has nothing to score"),
    "empty list": (record(prompt=[]), "prompt is empty", "want at least one message"),
    "empty messages": (record(prompt=[{"role": "user", "content": ""}]), "prompt is empty", "at least one message"),
    "surrogate": (record(response="a\ud800"), "half a surrogate pair (\\ud800)", "want whole characters"),
    "label word": (record(preference="good"), "preference is 'good'", WANT_LABEL),
    "label case": (record(preference="Chosen"), "preference is 'Chosen'", WANT_LABEL),
    "label two": (record(preference=2), "preference is 2", WANT_LABEL),
    "label score": (record(preference=0.5), "preference is 0.5", WANT_LABEL),
    "label null": (record(preference=None), "preference is null", WANT_LABEL),
    "label list": (record(preference=[1]), "preference is a list", WANT_LABEL),
    "label long": (record(preference="x" * 999), "preference is 'xxx", WANT_LABEL),
    "message": (record(prompt=["hi"]), "prompt[0] is a string", 'want {"role": ..., "content": ...}'),
    "no role": (record(prompt=[{"content": "hi"}]), "prompt[0] has no role", "want a string"),
    "no content": (record(prompt=[*USER, {"role": "user"}]), "prompt[1] has no content", "want a string"),
    "content list": (record(prompt=[{"role": "user", "content": []}]), "prompt[0].content is a list", "want a string"),
    "role": (
        record(prompt=[{"role": "human", "content": "hi"}]),
        "prompt[0].role is 'human'",
        "want system, developer",
    ),
    "tools": (record(prompt=[{**USER[0], "tool_calls": [1]}]), "prompt[0] has 'tool_calls'", "want only role and"),
    "message surrogate": (record(prompt=[{"role": "user", "content": "\udc00"}]), "prompt[0].content holds half", ""),
    "mix of kinds": (
        record(response=ANSWER),
        "response is a list of chat messages but prompt is a string",
        "want both",
    ),
    "prompt ends": (record(prompt=USER + ANSWER), "prompt ends with a message of the assistant", "want another role"),
    "response role": (record(prompt=USER, response=ANSWER + USER), "role 'user' in what is scored", "only assistant"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line(tmp_path, name):
    line, wrong, wanted = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    message = error_of(path)
    assert f"{path}:3: " in message
    assert wrong in message
    assert wanted in message
    assert len(message) < 500
    assert "problems (1)" in message


def _bad_file(name: str, path: Path) -> Path:
    if name == "directory.jsonl":
        path.mkdir()
    elif name == "truncated.jsonl.gz":
        path.write_bytes(gzip.compress(GOOD * 5000)[:-40])
    elif name == "checksum.jsonl.gz":
        data = bytearray(gzip.compress(GOOD))
        data[-8] ^= 1
        path.write_bytes(data)
    elif name == "columns.parquet":
        parquet.write_table(pa.table({"text": ["a"]}), path)
    elif name == "rows.parquet":
        parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    elif name != "missing.jsonl":
        contents = {"empty.jsonl": b"", "blank.jsonl": b" \n\n", "kind.json": GOOD, "plain.jsonl.gz": GOOD}
        path.write_bytes(contents.get(name, b"PAR1 nonsense"))
    return path


@pytest.mark.parametrize(
    ("name", "place", "wrong", "wanted"),
    [
        ("missing.jsonl", "", "does not exist", "want a file"),
        ("directory.jsonl", "", "is a directory", "want a file"),
        ("empty.jsonl", "", "is empty", "want at least one record"),
        ("blank.jsonl", "", "only blank lines", "want at least one record"),
        ("kind.json", "", "unknown kind", ".jsonl, .jsonl.gz or .parquet"),
        ("plain.jsonl.gz", ":1", "gzip stream is corrupt", "want a whole gzip file"),
        ("truncated.jsonl.gz", ":", "gzip stream is corrupt", "want a whole gzip file"),
        ("checksum.jsonl.gz", ":2", "gzip stream is corrupt", "want a whole gzip file"),
        ("corrupt.parquet", ":row 1", "parquet file is corrupt", "want a whole parquet file"),
        ("columns.parquet", "", "has none of the columns", "want prompt, response"),
        ("rows.parquet", "", "holds no row", "want at least one record"),
    ],
)
def test_bad_file(tmp_path, name, place, wrong, wanted):
    path = _bad_file(name, tmp_path / name)
    message = error_of(path)
    assert f"{path}{place}" in message
    assert wrong in message
    assert wanted in message


def test_bad_parquet_rows(tmp_path):
    path = tmp_path / "a.parquet"
    binary = pa.array([b"ok", b"\xff", b"ok"]).view(pa.string())
    parquet.write_table(pa.table({"prompt": binary, "response": ["r"] * 3, "preference": [1, 1, 5]}), path)
    message = error_of(path)
    assert f"{path}:row 2: holds text that is not valid UTF-8" in message
    assert f"{path}:row 3: preference is 5" in message


def test_no_file_and_same_file_twice(tmp_path):
    assert "no file is given" in error_of()
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    (tmp_path / "link.jsonl").symlink_to(path)
    assert f"{tmp_path / 'link.jsonl'}: is listed twice" in error_of(path, tmp_path / "link.jsonl")


def test_all_files_are_checked_and_twenty_problems_listed(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(GOOD + b"{}\n" * 15)
    second.write_bytes(b"{}\n" * 15)
    message = error_of(first, tmp_path / "missing.jsonl", second)
    assert "problems (31)" in message
    assert message.count("\n") == 21
    assert message.endswith("... and 11 more")
    assert f"{first}:16: " in message
    assert f"{second}:4: " in message
    assert f"{second}:5: " not in message


def test_streaming_stops_yielding_at_the_first_problem(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 3 + b"{}\n" + GOOD * 3)
    records = iter_records([path])
    assert [next(records).number for _ in range(3)] == [1, 2, 3]
    with pytest.raises(DataError):
        next(records)


def test_bad_data_is_reported_before_heavy_imports(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    code = (
        "import sys; from nemo_kto.data.records import read_records; assert read_records(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
