"""Records to token ids: exact ids, EOS and BOS, chat, merges, overlong rows."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from data_kit import char_tokenizer, codes, data_config, pair, rows, store_of, write_jsonl

from nemo_kto import interrupts
from nemo_kto.data import tokenize
from nemo_kto.data.tokenize import build_store, load_tokenizer
from nemo_kto.errors import CheckpointError, DataError, StoppedEarlyError

EOS = ord("$")
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}$\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = [{"role": "user", "content": "hi"}]


# --- ids


def test_worked_example(tmp_path):
    records = [pair("ab", "cd"), pair("ab", "e", liked=False), pair("x", "cd")]
    store = store_of(tmp_path, records, char_tokenizer(tmp_path / "tok"))
    assert rows(store) == [
        ([97, 98], [99, 100, EOS]),
        ([97, 98], [101, EOS]),
        ([120], [99, 100, EOS]),
    ]
    assert store.desirable.tolist() == [True, False, True]
    assert store.lengths(np.array([2, 0])).tolist() == [4, 5]
    assert store.prompt_key(0) == store.prompt_key(1) != store.prompt_key(2)
    assert store.response_key(0) == store.response_key(2) != store.response_key(1)
    assert len(store.prompt_key(0)) == 16
    summary = store.summary
    assert (summary.num_records, summary.num_rows, summary.num_desirable, summary.num_undesirable) == (3, 3, 2, 1)
    assert (summary.num_tokens, summary.longest_row, summary.boundary_merges) == (13, 5, 0)
    assert "3 rows (2 desirable, 1 undesirable, 13 tokens, longest 5) of 3 records" in summary.describe()


@pytest.mark.parametrize(
    ("response", "append", "ids"),
    [
        ("cd", True, "cd$"),
        ("cd$", True, "cd$"),
        ("c$d", True, "c$d$"),
        ("cd$\n", True, "cd$"),  # what a chat template leaves behind EOS
        ("cd", False, "cd"),
        ("cd$\n", False, "cd$\n"),
        ("$", True, "$"),
    ],
)
def test_one_eos(tmp_path, response, append, ids):
    store = store_of(tmp_path, [pair("ab$", response)], char_tokenizer(tmp_path / "tok"), append_eos=append)
    assert rows(store) == [(codes("ab$"), codes(ids))]


@pytest.mark.parametrize("prompt", ["ab", "^ab"])
def test_one_bos(tmp_path, prompt):
    store = store_of(tmp_path, [pair(prompt, "c")], char_tokenizer(tmp_path / "tok", bos="^"))
    assert rows(store) == [(codes("^ab"), codes("c$"))]


def test_no_bos_in_chat(tmp_path):
    tokenizer = char_tokenizer(tmp_path / "tok", bos="^", template=CHATML)
    assert rows(store_of(tmp_path, [pair(USER, "yo")], tokenizer)) == [
        (codes("<user>hi$\n<assistant>"), codes("yo$")),
    ]


def test_chat_lists_and_strings_agree(tmp_path):
    answer = [{"role": "assistant", "content": "yo"}]
    records = [pair(USER, "yo"), pair(USER, answer), pair("<user>hi$\n<assistant>", "yo$")]
    store = store_of(tmp_path, records, char_tokenizer(tmp_path / "tok", template=CHATML))
    assert rows(store) == [(codes("<user>hi$\n<assistant>"), codes("yo$"))] * 3
    assert store.prompt_key(0) == store.prompt_key(2)


def test_chat_template_that_rewrites_the_generation_prompt(tmp_path):
    template = CHATML.replace("<assistant>{% endif %}", "<assistant>(think){% endif %}")
    store = store_of(tmp_path, [pair(USER, "yo")], char_tokenizer(tmp_path / "tok", template=template))
    assert rows(store) == [(codes("<user>hi$\n<assistant>"), codes("yo$"))]
    assert store.summary.boundary_merges == 1


def test_real_chat_tokenizer(tmp_path):
    tiny.make_tokenizer(tmp_path / "tok")
    store = store_of(tmp_path, [pair(USER, "the film")], tmp_path / "tok")
    tokenizer = load_tokenizer(tmp_path / "tok")
    assert tokenizer.decode(store.prompt(0)) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(store.response(0)) == "the film<|im_end|>"


def test_merge_across_the_boundary(tmp_path):
    tokenizer = char_tokenizer(tmp_path / "tok", merges=[("b", "c")])
    store = store_of(tmp_path, [pair("ab", "cd"), pair("ab", "d")], tokenizer)
    assert rows(store) == [([97], [256, 100, EOS]), ([97, 98], [100, EOS])]
    assert store.summary.boundary_merges == 1
    assert store.prompt_key(0) == store.prompt_key(1), "the same prompt, though it was split elsewhere"


def test_merge_of_the_whole_prompt_falls_back_to_separate_tokens(tmp_path):
    tokenizer = char_tokenizer(tmp_path / "tok", merges=[("b", "c")])
    store = store_of(tmp_path, [pair("b", "cd")], tokenizer)
    assert rows(store) == [([98], [99, 100, EOS])]
    assert store.summary.boundary_merges == 1


# --- what cannot be used


def test_overlong_drop_and_truncate(tmp_path):
    records = [pair("abc", "d"), pair("abc", "defg", False), pair("abcdefg", "h"), pair("a", "bcd")]
    tokenizer = char_tokenizer(tmp_path / "tok")
    dropped = store_of(tmp_path, records, tokenizer, seq_length=5)
    assert rows(dropped) == [(codes("abc"), codes("d$")), (codes("a"), codes("bcd$"))]
    assert dropped.record_index.tolist() == [0, 3]
    assert (dropped.summary.num_records, dropped.summary.dropped_overlong, dropped.summary.truncated) == (4, 2, 0)
    cut = store_of(tmp_path, records, tokenizer, seq_length=5, overlong="truncate")
    assert rows(cut) == [(codes("abc"), codes("d$")), (codes("abc"), codes("de")), (codes("a"), codes("bcd$"))]
    assert cut.record_index.tolist() == [0, 1, 3]
    assert (cut.summary.dropped_overlong, cut.summary.truncated) == (1, 1)


def test_overlong_error_names_twenty(tmp_path):
    records = [pair("abc", "d"), *[pair("abc", "defg")] * 25]
    with pytest.raises(DataError) as caught:
        store_of(tmp_path, records, char_tokenizer(tmp_path / "tok"), seq_length=5, overlong="error")
    message = str(caught.value)
    assert "data.jsonl:2: prompt (3) and response (5) make 8 tokens; want at most model.data.seq_length=5" in message
    assert message.endswith("... and 5 more")
    assert not list((tmp_path / "cache").glob("*.tmp-*")), "a failed build leaves nothing"


def test_all_overlong(tmp_path):
    with pytest.raises(DataError, match=r"all 2 records of .*data.jsonl are longer than model.data.seq_length=3"):
        store_of(tmp_path, [pair("abc", "d")] * 2, char_tokenizer(tmp_path / "tok"), seq_length=3)


def test_chat_without_template(tmp_path):
    with pytest.raises(DataError, match=r"data.jsonl:2: holds chat messages, but the tokenizer .* no chat template"):
        store_of(tmp_path, [pair("a", "b"), pair(USER, "b")], char_tokenizer(tmp_path / "tok"))


def test_template_that_refuses(tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"data.jsonl:1: .*roles must alternate.*; want roles"):
        store_of(tmp_path, [pair(USER, "b")], char_tokenizer(tmp_path / "tok", template=template))


def test_tokenizer_without_eos(tmp_path):
    tokenizer = char_tokenizer(tmp_path / "tok", eos=None)
    with pytest.raises(CheckpointError, match="no EOS token; set eos_token"):
        store_of(tmp_path, [pair("a", "b")], tokenizer)
    assert rows(store_of(tmp_path, [pair("a", "b")], tokenizer, append_eos=False)) == [(codes("a"), codes("b"))]


def test_missing_or_broken_tokenizer(tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [pair("a", "b")])
    with pytest.raises(CheckpointError, match="is not a directory"):
        build_store([data], tmp_path / "none", data_config(tmp_path))
    with pytest.raises(CheckpointError, match="is not a directory"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no usable tokenizer"):
        build_store([data], tmp_path / "empty", data_config(tmp_path))
    (tmp_path / "empty" / "tokenizer.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="holds no usable tokenizer"):
        load_tokenizer(tmp_path / "empty")


def test_bad_data_comes_before_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"missing.jsonl: does not exist"):
        build_store([tmp_path / "missing.jsonl"], tmp_path / "none", data_config(tmp_path))


# --- processes


def test_processes_give_the_same_store(tmp_path, monkeypatch):
    data = tiny.make_records(tmp_path / "data.jsonl", 1500)
    tiny.make_tokenizer(tmp_path / "tok")
    alone = build_store([data], tmp_path / "tok", data_config(tmp_path / "one"))
    monkeypatch.setattr(tokenize, "BYTES_PER_WORKER", 1000)
    together = build_store([data], tmp_path / "tok", data_config(tmp_path / "two", tokenize_workers=2))
    assert alone.summary == together.summary
    for name in ("ids", "offsets", "prompt_keys", "response_keys", "record_index"):
        assert (alone.path / f"{name}.npy").read_bytes() == (together.path / f"{name}.npy").read_bytes()


def test_a_signal_ends_it_before_the_next_records(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupts, "requested", lambda: "SIGTERM")
    with pytest.raises(StoppedEarlyError, match="stopped by SIGTERM while the data was tokenised"):
        store_of(tmp_path, [pair("a", "b")], char_tokenizer(tmp_path / "tok"))


def test_small_inputs_stay_in_process():
    assert tokenize._num_workers([__file__], None) == 1
    assert tokenize._num_workers([__file__], 8) == 1
