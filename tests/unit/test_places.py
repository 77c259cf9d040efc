"""From a record's number over all files back to the line it stands on."""

from __future__ import annotations

import gzip

import pyarrow
from data_kit import write_jsonl
from pyarrow import parquet

from nemo_kto.data.places import RecordPlaces
from nemo_kto.data.records import read_records


def three_files(folder):
    """Plain with blank lines and a byte order mark alone on one, compressed, parquet."""
    line = '{"prompt": "a", "response": "b", "preference": "chosen"}'
    plain, packed, columns = folder / "a.jsonl", folder / "b.jsonl.gz", folder / "c.parquet"
    plain.write_bytes(b"\xef\xbb\xbf\n" + f"\n{line}\n  \n\n{line}\n{line}\n\n".encode())
    packed.write_bytes(gzip.compress(f"{line}\n\n{line}".encode()))
    parquet.write_table(pyarrow.table({"prompt": ["p", "q"], "response": ["r", "s"], "preference": [1, 0]}), columns)
    return [str(path) for path in (plain, packed, columns)]


def test_every_record_is_found_where_the_reader_found_it(tmp_path):
    files = three_files(tmp_path)
    expected = [record.where for record in read_records(files)]
    assert len(expected) == 7
    assert RecordPlaces(files).where(range(7)) == expected
    assert RecordPlaces(files).where([6, 0, 3]) == [expected[6], expected[0], expected[3]]
    assert expected[6].endswith("c.parquet:row 2")


def test_what_is_no_longer_there_keeps_its_number(tmp_path):
    file = tmp_path / "data.jsonl"
    write_jsonl(file, [{"prompt": "a", "response": "b", "preference": "chosen"}] * 2)
    assert RecordPlaces([str(file)]).where([1, 2]) == [f"{file}:2", "record 3"]
    file.unlink()
    assert RecordPlaces([str(file)]).where([1]) == ["record 2"]
