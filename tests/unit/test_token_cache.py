"""The token cache: found by content, built once, and mended under every misfortune."""

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

import pytest
from data_kit import char_tokenizer, codes, data_config, pair, rows, store_of, write_jsonl

from nemo_kto.data import tokenize
from nemo_kto.data.cache import cache_root
from nemo_kto.data.store import is_intact
from nemo_kto.data.tokenize import build_store
from nemo_kto.errors import DataError


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
