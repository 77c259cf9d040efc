"""The cache's files: what is read back, what damage costs, and what several processes may do at once."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest

from nemo_kto.reference import log_prob_file
from nemo_kto.reference.log_prob_file import ForeignFileError, RecordWriter, as_keys, header, make_records
from nemo_kto.reference.log_prob_store import LogProbStore
from nemo_kto.reference.row_keys import RowKey
from nemo_kto.reference.sorted_runs import SortedRuns

ME, OTHER = b"m" * 32, b"o" * 32
HEADER, RECORD = 64, 32


def key(number: int) -> RowKey:
    return RowKey(number.to_bytes(8, "little") + b"12345678", num_tokens=number % 7 + 1)


def value(number: int) -> float:
    return -number - 1 / 3  # no float32 has it


def fill(folder: Path, numbers: range, identity: bytes = ME) -> LogProbStore:
    store = LogProbStore(folder, identity)
    store.put([(key(n), value(n)) for n in numbers])
    return store


def known(folder: Path, numbers: range) -> list[int]:
    """Which of the numbers a new reader finds; each with its very value."""
    found = LogProbStore(folder, ME).get([key(n) for n in numbers])
    assert all(v == value(n) for n, v in zip(numbers, found, strict=True) if not np.isnan(v))
    return [n for n, v in zip(numbers, found, strict=True) if not np.isnan(v)]


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.logps")
    return path


# --- the format


def test_a_file_is_its_header_and_records_of_32_bytes(tmp_path):
    fill(tmp_path, range(3)).close()
    data = only_file(tmp_path).read_bytes()
    assert len(data) == HEADER + 3 * RECORD
    assert data[:16] == b"nemo_kto logprob"
    record = data[HEADER + RECORD : HEADER + 2 * RECORD]
    assert record[:16] == key(1).key
    assert np.frombuffer(record[16:24], "<f8")[0] == value(1)
    assert int.from_bytes(record[24:28], "little") == key(1).num_tokens
    assert int.from_bytes(record[28:], "little") == zlib.crc32(record[:28])


def test_checksums_are_those_of_zlib():
    rng = np.random.default_rng(0)
    records = np.frombuffer(rng.bytes(RECORD * 1000), log_prob_file.RECORD)
    assert log_prob_file.checksums(records).tolist() == [zlib.crc32(r.tobytes()[:-4]) for r in records]


def test_float64_is_kept_bit_for_bit(tmp_path):
    fill(tmp_path, range(200)).close()
    assert known(tmp_path, range(200)) == list(range(200))


def test_numbers_that_are_not_finite_are_not_kept(tmp_path):
    store = LogProbStore(tmp_path, ME)
    store.put([(key(1), float("nan")), (key(2), float("-inf")), (key(3), -1.0)])
    assert np.isnan(store.get([key(1), key(2), key(3)])).tolist() == [True, True, False]


# --- damage


@pytest.mark.parametrize("cut", [1, 16, 31])
def test_a_torn_tail_costs_its_record_only(tmp_path, cut):
    fill(tmp_path, range(10)).close()
    path = only_file(tmp_path)
    os.truncate(path, path.stat().st_size - cut)
    assert known(tmp_path, range(10)) == list(range(9))


@pytest.mark.parametrize("size", [0, 10, HEADER - 1, HEADER])
def test_a_file_without_records_holds_nothing(tmp_path, size):
    fill(tmp_path, range(10)).close()
    os.truncate(only_file(tmp_path), size)
    assert known(tmp_path, range(10)) == []


@pytest.mark.parametrize("byte", range(RECORD))
def test_a_flipped_bit_costs_its_record_only(tmp_path, byte, caplog):
    fill(tmp_path, range(10)).close()
    path = only_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[HEADER + 4 * RECORD + byte] ^= 16
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert known(tmp_path, range(10)) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert f"{path} has 1 damaged records: those are scored anew" in caplog.text
    fill(tmp_path, range(4, 5)).close()  # scored anew, into another file
    assert known(tmp_path, range(10)) == list(range(10))


@pytest.mark.parametrize("byte", range(HEADER))
def test_nothing_is_taken_from_a_file_whose_header_is_damaged(tmp_path, byte):
    fill(tmp_path, range(10)).close()
    path = only_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[byte] ^= 16
    path.write_bytes(data)
    assert known(tmp_path, range(10)) == []


FOREIGN = {
    "text": (b"step,loss\n" * 50, "it is no file of log-probs"),
    "other reference": (header(OTHER) + make_records([key(1).key], [-1.0], [1]).tobytes(), "of another reference"),
    "other version": (header(ME)[:16] + b"\2" + header(ME)[17:], "it has version 2"),
    "damaged": (header(ME)[:25] + b"!" + header(ME)[26:], "its header is damaged"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_named_once_and_left_alone(tmp_path, kind, caplog):
    data, why = FOREIGN[kind]
    (tmp_path / "foreign.logps").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        store = fill(tmp_path, range(3))
        store.get([key(77)])
        store.get([key(78)])
    assert caplog.text.count("foreign.logps is not used: ") == 1
    assert why in caplog.text
    assert np.isnan(store.get([key(1), key(5)])).tolist() == [False, True]
    assert (tmp_path / "foreign.logps").read_bytes() == data


def test_read_refuses_by_name(tmp_path):
    (tmp_path / "x.logps").write_bytes(header(OTHER))
    with pytest.raises(ForeignFileError, match="another reference"):
        log_prob_file.read(tmp_path / "x.logps", ME)


# --- several processes


def test_writers_have_files_of_their_own_and_find_what_others_write_meanwhile(tmp_path):
    first, second = fill(tmp_path, range(5)), fill(tmp_path, range(5, 10))
    assert len(list(tmp_path.glob("*.logps"))) == 2
    for store in (first, second):
        assert store.get([key(n) for n in range(10)]).tolist() == [value(n) for n in range(10)]
    second.put([(key(20), value(20))])
    assert first.get([key(20)]).tolist() == [value(20)]
    first.close()
    second.close()
    assert known(tmp_path, range(30)) == [*range(10), 20]


def test_what_was_told_first_is_told_again(tmp_path):
    store = fill(tmp_path, range(3))
    other = LogProbStore(tmp_path / "elsewhere", ME)
    other.put([(key(1), -77.0)])
    other.close()
    only_file(tmp_path / "elsewhere").rename(tmp_path / "0.logps")
    assert np.isnan(store.get([key(5)])).all()  # looks at the new file
    assert store.get([key(1)]).tolist() == [value(1)]


def _write(folder: Path, start: int, ready: threading.Event) -> None:
    store = LogProbStore(folder, ME, about="what it is of")
    ready.wait(30)
    for n in range(start, start + 300):
        store.put([(key(n), value(n))])
    os._exit(9 if store.failure is None else 1)  # as a kill would: neither flushed nor closed


def test_readers_see_whole_records_while_two_processes_write_and_die(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    writers = [context.Process(target=_write, args=(tmp_path, start, ready)) for start in (0, 1000)]
    for writer in writers:
        writer.start()
    reader, numbers, seen = LogProbStore(tmp_path, ME), [*range(300), *range(1000, 1300)], 0
    ready.set()
    while any(writer.is_alive() for writer in writers):
        found = reader.get([key(n) for n in numbers])
        whole = ~np.isnan(found)
        assert all(v == value(n) for n, v in zip(numbers, found, strict=True) if not np.isnan(v))
        assert whole.sum() >= seen, "what was known is known no longer"
        seen = whole.sum()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [9, 9]
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".logps"} == {"reference.json"}
    assert not np.isnan(reader.get([key(n) for n in numbers])).any()


# --- nothing can be written


@pytest.fixture
def full(monkeypatch):
    """A disk that takes 40 bytes more and then no more."""
    room, write = [HEADER + 40], os.write

    def take(handle: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        done = write(handle, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", take)


@pytest.mark.usefixtures("full")
def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        store = fill(tmp_path, range(5))
        store.put([(key(n), value(n)) for n in range(5, 9)])
        store.flush()
        store.close()
    assert caplog.text.count("cannot be written (No space left on device)") == 1
    assert "The run goes on" in caplog.text
    assert "No space left" in store.failure
    assert store.get([key(n) for n in range(9)]).tolist() == [value(n) for n in range(9)], "kept in memory"
    assert known(tmp_path, range(9)) == [0], "and what reached the disk is whole"


def test_a_place_that_cannot_be_written_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.ERROR):
        store = fill(tmp_path / "file" / "cache", range(3))
        store.put([(key(9), value(9))])
    assert caplog.text.count("cannot be written (Not a directory)") == 1
    assert store.get([key(0), key(9)]).tolist() == [value(0), value(9)]


def test_a_folder_that_is_read_only_is_read(tmp_path, monkeypatch):
    fill(tmp_path, range(3)).close()

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # permissions do not stop root
    store = fill(tmp_path, range(3, 6))
    assert "Permission denied" in store.failure
    assert known(tmp_path, range(6)) == [0, 1, 2]


def test_flush_forces_records_to_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    writer = RecordWriter(tmp_path, ME)
    writer.flush()
    assert synced == [], "nothing was written"
    writer.append(make_records([key(1).key], [-1.0], [1]))
    writer.flush()
    assert synced[0] == HEADER + RECORD


# --- the index


def test_an_index_of_many_runs_tells_what_a_dictionary_tells():
    """Keys that share a half, keys that come twice, runs of every size."""
    rng = np.random.default_rng(0)
    runs, wanted = SortedRuns(), {}
    for size in [1, 1, 1, 5, 2, 100, 1, 1, 30, 7, 0, 500, 3]:
        keys = rng.integers(0, 30, size=(size, 2), dtype=np.uint64)
        values = rng.random(size)
        runs.add(keys, values)
        for one, number in zip(keys.tolist(), values.tolist(), strict=True):
            wanted.setdefault(tuple(one), number)
    asked = np.array([[a, b] for a in range(31) for b in range(31)], np.uint64)
    found = runs.get(asked)
    for one, number in zip(asked.tolist(), found.tolist(), strict=True):
        assert number == wanted[tuple(one)] if tuple(one) in wanted else np.isnan(number)
    assert len(runs) == 652


def test_an_empty_index_knows_nothing():
    runs = SortedRuns()
    assert np.isnan(runs.get(as_keys([b"k" * 16]))).all()
    assert runs.get(np.zeros((0, 2), np.uint64)).size == 0
