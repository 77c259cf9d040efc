"""Records to token ids: exact ids, EOS and BOS, chat, merges, overlong rows, and the cache under every misfortune."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from data_kit import char_tokenizer, data_config, pair, write_jsonl

from nemo_kto.data import tokenize
from nemo_kto.data.cache import cache_root
from nemo_kto.data.store import TokenStore, is_intact
from nemo_kto.data.tokenize import build_store, load_tokenizer
from nemo_kto.errors import CheckpointError, DataError

EOS = ord("$")
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}$\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = [{"role": "user", "content": "hi"}]


def codes(text: str) -> list[int]:
    return [ord(c) for c in text]


def store_of(tmp_path: Path, records: list[dict], tokenizer: Path, **changes) -> TokenStore:
    data = write_jsonl(tmp_path / "data.jsonl", records)
    return build_store([data], tokenizer, data_config(tmp_path / "cache", **changes))


def rows(store: TokenStore) -> list[tuple[list[int], list[int]]]:
    return [(store.prompt(i).tolist(), store.response(i).tolist()) for i in range(len(store))]


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


def test_small_inputs_stay_in_process():
    assert tokenize._num_workers([__file__], None) == 1
    assert tokenize._num_workers([__file__], 8) == 1


# --- cache


@pytest.fixture
def built(tmp_path):
    """A store with two rows, and how to ask for it again."""
    tokenizer = char_tokenizer(tmp_path / "tok")
    records = [pair("ab", "cd"), pair("x", "yz", False)]
    return store_of(tmp_path, records, tokenizer), tmp_path / "data.jsonl", tokenizer, data_config(tmp_path / "cache")


@pytest.fixture
def no_build(monkeypatch):
    def refuse(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(tokenize, "_write", refuse)


def test_hit(built, no_build):
    store, data, tokenizer, config = built
    os.utime(data, (1, 1))
    copy = data.with_name("copy.jsonl")
    copy.write_bytes(data.read_bytes())
    assert build_store([copy], tokenizer, config).path == store.path, "content counts, not name or time"


@pytest.mark.parametrize(
    "change", ["data", "tokenizer", "template", "seq_length", "append_eos", "overlong", "version"]
)
def test_miss(built, change, monkeypatch):
    store, data, tokenizer, config = built
    if change == "data":
        data.write_text(data.read_text().replace("cd", "ce"))
    elif change == "tokenizer":
        path = tokenizer / "tokenizer_config.json"
        path.write_text(path.read_text().replace('"$"', '"#"'))
    elif change == "template":
        (tokenizer / "chat_template.jinja").write_text("x")
    elif change == "version":
        monkeypatch.setattr("nemo_kto.data.cache.CODE_VERSION", 0)
    else:
        values = {"seq_length": 1023, "append_eos": False, "overlong": "truncate"}
        config = data_config(Path(config.cache_dir), **{change: values[change]})
    assert build_store([data], tokenizer, config).path != store.path


def test_weights_beside_the_tokenizer_do_not_matter(built, no_build):
    store, data, tokenizer, config = built
    (tokenizer / "model.safetensors").write_bytes(b"w")
    (tokenizer / "model.safetensors.index.json").write_text("{}")
    assert build_store([data], tokenizer, config).path == store.path


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "summary", "directory"])
def test_damage_is_repaired(built, damage, caplog):
    store, data, tokenizer, config = built
    before, path = rows(store), store.path
    ids, manifest = path / "ids.npy", path / "store.json"
    content = bytearray(ids.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        ids.write_bytes(content)
    elif damage == "cut":
        ids.write_bytes(content[:-4])
    elif damage == "remove":
        (path / "offsets.npy").unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-9])
    elif damage == "summary":
        manifest.write_text(manifest.read_text().replace('"num_rows": 2', '"num_rows": 3'))
    else:
        for file in path.iterdir():
            file.unlink()
    assert not is_intact(path)
    with caplog.at_level(logging.WARNING):
        again = build_store([data], tokenizer, config)
    assert rows(again) == before
    assert again.path == path
    assert "damaged" in caplog.text
    assert sorted(f.name for f in path.parent.iterdir()) == sorted([path.name, f"{path.name}.lock"])


def test_disk_that_forgets_is_blamed(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_kto.data.cache.is_intact", lambda path: False)
    with pytest.raises(DataError, match="does not read back as it was written"):
        store_of(tmp_path, [pair("a", "b")], char_tokenizer(tmp_path / "tok"))


def test_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot be written or read.*model.data.cache_dir, or \$NEMO_KTO_CACHE"):
        store_of(tmp_path, [pair("a", "b")], char_tokenizer(tmp_path / "tok"))


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("NEMO_KTO_CACHE", str(tmp_path))
    assert cache_root("/x") == Path("/x")
    assert cache_root(None) == tmp_path
    monkeypatch.delenv("NEMO_KTO_CACHE")
    assert cache_root(None) == Path.home() / ".cache" / "nemo_kto"


def test_store_pickles_as_its_path(built):
    store = built[0]
    text = pickle.dumps(store)
    assert len(text) < 500
    assert rows(pickle.loads(text)) == rows(store)


BUILDER = """
    import sys, time
    from pathlib import Path
    from data_kit import data_config
    from nemo_kto.data import tokenize
    root, behaviour = Path(sys.argv[1]), sys.argv[2]
    write = tokenize._write
    def slow(out, files, work):
        with (root / "builds").open("a") as log:
            log.write("build\\n")
        (out / "ids.npy").write_bytes(b"half")
        time.sleep(60 if behaviour == "hang" else 0.5)
        write(out, files, work)
    tokenize._write = slow
    store = tokenize.build_store([root / "data.jsonl"], root / "tok", data_config(root / "cache"))
    print(store.response(1).tolist())
"""


def start_builder(root: Path, behaviour: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", textwrap.dedent(BUILDER), str(root), behaviour]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def shared(tmp_path):
    char_tokenizer(tmp_path / "tok")
    write_jsonl(tmp_path / "data.jsonl", [pair("ab", "cd"), pair("x", "yz", False)])
    return tmp_path


def test_concurrent_ranks_build_once(shared):
    ranks = [start_builder(shared, "work") for _ in range(3)]
    outputs = {rank.communicate(timeout=120)[0] for rank in ranks}
    assert outputs == {f"{codes('yz$')}\n"}
    assert all(rank.returncode == 0 for rank in ranks)
    assert (shared / "builds").read_text() == "build\n"


def test_dead_builder_is_replaced(shared):
    dying = start_builder(shared, "hang")
    deadline = time.monotonic() + 60
    while not (shared / "builds").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    waiting = start_builder(shared, "work")
    time.sleep(0.2)
    dying.send_signal(signal.SIGKILL)
    dying.communicate()
    assert waiting.communicate(timeout=120)[0] == f"{codes('yz$')}\n"
    assert (shared / "builds").read_text() == "build\nbuild\n"
    assert not list((shared / "cache").glob("*.tmp-*")), "what the dead one left is gone"


def test_manifest_is_json(built):
    manifest = json.loads((built[0].path / "store.json").read_text())
    assert manifest["summary"]["num_rows"] == 2
