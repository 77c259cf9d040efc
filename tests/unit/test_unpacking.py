"""The cache of unpacked archives: made once, by many processes at once, never stale, never half."""

from __future__ import annotations

import multiprocessing
import os

import pytest
from nemo_archives import FILES, contents, fill

from nemo_kto.checkpoint import unpacking
from nemo_kto.checkpoint.nemo_archive import pack
from nemo_kto.errors import CheckpointError


def keep(folder, records):
    return records


@pytest.fixture
def packed(tmp_path):
    pack(fill(tmp_path / "source"), tmp_path / "model.nemo")
    return tmp_path / "model.nemo"


def test_an_archive_is_unpacked_once(packed, tmp_path):
    made = []
    places = [unpacking.unpack(packed, tmp_path / "cache", "raw", lambda f, r: made.append(f) or r) for _ in range(2)]
    assert places[0] == places[1]
    assert len(made) == 1
    found = contents(places[0])
    assert found.pop("manifest.json")
    assert found == FILES


def test_another_archive_in_the_same_place_is_not_taken_for_the_first(packed, tmp_path):
    """Same path, length and time: the bytes decide."""
    first = unpacking.unpack(packed, tmp_path / "cache", "raw", keep)
    times = packed.stat()
    fill(tmp_path / "source", {"model_config.yaml": b"a: 2\n"})
    pack(tmp_path / "source", packed)
    os.utime(packed, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = unpacking.unpack(packed, tmp_path / "cache", "raw", keep)
    assert (first / "model_config.yaml").read_bytes() == b"a: 1\n"
    assert (second / "model_config.yaml").read_bytes() == b"a: 2\n"


def test_an_old_archive_is_hashed_once(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "_TICK_NS", -1)
    place = unpacking.unpack(packed, tmp_path / "cache", "raw", keep)
    monkeypatch.setattr(unpacking, "opened", None)
    assert unpacking.unpack(packed, tmp_path / "cache", "raw", keep) == place


@pytest.mark.parametrize("damage", ["lost", "cut", "no manifest"])
def test_a_damaged_directory_is_made_again(damage, packed, tmp_path):
    place = unpacking.unpack(packed, tmp_path / "cache", "raw", keep)
    if damage == "lost":
        (place / "model_config.yaml").unlink()
    elif damage == "cut":
        (place / "model_weights/__0_0.distcp").write_bytes(b"x")
    else:
        (place / "manifest.json").unlink()
    assert unpacking.unpack(packed, tmp_path / "cache", "raw", keep) == place
    assert {name: data for name, data in contents(place).items() if name != "manifest.json"} == FILES


def test_what_fails_leaves_nothing_but_locks(packed, tmp_path):
    def fail(folder, records):
        raise CheckpointError("not this one")

    with pytest.raises(CheckpointError, match="not this one"):
        unpacking.unpack(packed, tmp_path / "cache", "raw", fail)
    assert all(p.suffix == ".lock" for p in (tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_named(packed, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be unpacked in .*NEMO_KTO_CACHE"):
        unpacking.unpack(packed, tmp_path / "file" / "cache", "raw", keep)


def _unpack_in_process(archive, root, made):
    def settle(folder, records):
        made.put(str(folder))
        return records

    unpacking.unpack(archive, root, "raw", settle)


def test_many_processes_unpack_once(packed, tmp_path):
    context = multiprocessing.get_context("fork")
    made = context.SimpleQueue()
    processes = [context.Process(target=_unpack_in_process, args=(packed, tmp_path / "cache", made)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    made.get()
    assert made.empty()
    assert not list((tmp_path / "cache").glob("*.tmp-*"))
