"""``.nemo`` archives: what is packed comes back, what is damaged or hostile is refused, nothing leaves its folder."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nemo_archives import FILES, contents, entries, entry, fill, foreign

from nemo_kto.checkpoint import tar
from nemo_kto.checkpoint.nemo_archive import extract, members, pack
from nemo_kto.errors import CheckpointError


@pytest.fixture
def packed(tmp_path):
    pack(fill(tmp_path / "source"), tmp_path / "model.nemo")
    return tmp_path / "model.nemo"


# --- writing and reading


def test_what_is_packed_comes_back(packed, tmp_path):
    (tmp_path / "out").mkdir()
    records = extract(packed, tmp_path / "out")
    assert contents(tmp_path / "out") == FILES
    assert {name: r.sha256 for name, r in records.items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()
    }


def test_the_same_files_give_the_same_bytes(packed, tmp_path):
    other = fill(tmp_path / "elsewhere", dict(reversed(FILES.items())))
    os.utime(other / "model_config.yaml", (1, 1))
    (other / "model_config.yaml").chmod(0o600)
    pack(other, tmp_path / "again.nemo")
    assert packed.read_bytes() == (tmp_path / "again.nemo").read_bytes()


def test_pythons_reader_and_nemos_names(packed):
    with tarfile.open(packed) as archive:
        assert archive.extractfile("./model_config.yaml").read() == FILES["model_config.yaml"]
        listed = json.load(archive.extractfile("./manifest.json"))["files"]
    assert listed.keys() == FILES.keys()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_every_form_of_tar_is_read(form, mode, tmp_path):
    long = "/".join(["folder" * 8] * 4) + "/file" if form != tarfile.USTAR_FORMAT else "folder/" * 20 + "file"
    files = {**FILES, long: b"long", "späte/Namen" if form != tarfile.USTAR_FORMAT else "plain": b"u"}
    archive = foreign(tmp_path / "a.nemo", files, mode, format=form)
    (tmp_path / "out").mkdir()
    extract(archive, tmp_path / "out")
    assert contents(tmp_path / "out") == files


def test_sizes_beyond_octal_are_read():
    for field, size in ((b"\x80" + (1 << 40).to_bytes(11, "big"), 1 << 40), (b"00000000017\0", 15)):
        assert tar.TarReader(io.BytesIO(gzip.compress(b"")), Path("x"))._number(field) == size


def test_a_failed_write_leaves_the_old_archive_and_no_draft(packed, tmp_path, monkeypatch):
    before = packed.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        pack(tmp_path / "source", packed)
    assert packed.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.nemo", "source"]


# --- damage


@pytest.mark.parametrize("cut", [0, 1, 300, 512, 700, 1024, 5000, -1024, -10240])
def test_a_truncated_archive_is_refused(cut, tmp_path):
    """Also where a header would begin, which Python's reader takes for the end."""
    whole = foreign(tmp_path / "whole.nemo").read_bytes()
    end = whole.rstrip(b"\0")
    data = whole[:cut] if cut >= 0 else end[: len(end) // 512 * 512] if cut == -1024 else whole[: len(whole) + cut]
    (tmp_path / "cut.nemo").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"cut\.nemo is (truncated|damaged)"):
        members(tmp_path / "cut.nemo")


def test_a_garbled_header_in_the_middle_is_refused(tmp_path):
    data = bytearray(foreign(tmp_path / "a.nemo", format=tarfile.USTAR_FORMAT).read_bytes())
    place = data.find(b"./model_config.yaml")
    data[place + 5] ^= 1
    (tmp_path / "a.nemo").write_bytes(data)
    with tarfile.open(tmp_path / "a.nemo") as lenient:
        assert "./model_config.yaml" not in lenient.getnames(), "this is why there is a reader of our own"
    with pytest.raises(CheckpointError, match=r"a\.nemo is damaged, or no tar file: a header's checksum is wrong"):
        members(tmp_path / "a.nemo")


def test_a_flipped_bit_in_the_data_is_found_by_the_manifest(packed, tmp_path):
    data = bytearray(packed.read_bytes())
    data[data.find(bytes(range(256))) + 7] ^= 1
    packed.write_bytes(data)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"model.nemo is damaged: model_weights/__0_0.distcp differs"):
        extract(packed, tmp_path / "out")


@pytest.mark.parametrize(("change", "what"), [("hf/empty", "is missing"), ("extra", "is not in its manifest")])
def test_the_manifest_and_the_members_must_agree(change, what, packed, tmp_path):
    with tarfile.open(packed) as old, tarfile.open(tmp_path / "new.nemo", "w") as new:
        for info in old:
            if info.name != f"./{change}":
                new.addfile(info, old.extractfile(info) if info.isfile() else None)
        if change == "extra":
            new.addfile(entry("./extra"))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=what):
        extract(tmp_path / "new.nemo", tmp_path / "out")


def test_damaged_compression_is_refused(tmp_path):
    data = bytearray(foreign(tmp_path / "a.nemo", mode="w:gz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.nemo").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.nemo"):
        members(tmp_path / "a.nemo")


def test_an_archive_larger_than_the_disk_is_refused_before_anything_is_written(packed, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 100))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"needs 0.0 GB unpacked, but .* left: point model.data.cache_dir"):
        extract(packed, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_missing_archive_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.nemo cannot be opened: No such file"):
        members(tmp_path / "none.nemo")


# --- hostility

HOSTILE = {
    "absolute": (entry("/absolute/pwned", size=3), "outside its directory"),
    "parent": (entry("./a/../../pwned", size=3), "outside its directory"),
    "parent folder": (entry("../pwned", tarfile.DIRTYPE), "outside its directory"),
    "no name": (entry("./", size=3), "outside its directory"),
    "symlink": (entry("link", tarfile.SYMTYPE, link="/etc"), "a symbolic link"),
    "symlink inside": (entry("link", tarfile.SYMTYPE, link="first"), "a symbolic link"),
    "hard link": (entry("link", tarfile.LNKTYPE, link="first"), "a hard link"),
    "character device": (entry("null", tarfile.CHRTYPE), "a character device"),
    "block device": (entry("disk", tarfile.BLKTYPE), "a block device"),
    "pipe": (entry("pipe", tarfile.FIFOTYPE), "a named pipe"),
    "unknown": (entry("odd", b"Z"), "a member of type b'Z'"),
    "twice": (entry("./first"), "holds 'first' twice"),
    "under a file": (entry("first/second", size=3), "both as a file and as a directory"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_hostile_member_is_refused_before_anything_is_written(name, mode, tmp_path):
    info, message = HOSTILE[name]
    archive = entries(tmp_path / "bad.nemo", entry("first", size=5), info, mode=mode)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=message) as refused:
        extract(archive, tmp_path / "out")
    assert "bad.nemo" in str(refused.value)
    assert not list((tmp_path / "out").iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.nemo", "out"]
    assert not Path("/absolute").exists()


def test_a_pax_header_cannot_smuggle_a_name_or_size_past_the_checks(tmp_path):
    for headers in ({"path": "/absolute/pwned"}, {"path": "../pwned"}, {"size": "-1"}, {"GNU.sparse.major": "1"}):
        info = entry("plain", size=3)
        info.pax_headers = headers
        with tarfile.open(tmp_path / "bad.nemo", "w", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(info, io.BytesIO(b"xxx"))
        with pytest.raises(CheckpointError):
            members(tmp_path / "bad.nemo")
    with tarfile.open(tmp_path / "bad.nemo", "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "x"}) as archive:
        archive.addfile(entry("plain"))
    with pytest.raises(CheckpointError, match="all members"):
        members(tmp_path / "bad.nemo")


def test_more_members_than_any_archive_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MAX_MEMBERS", 10)
    entries(tmp_path / "ten.nemo", *(entry(str(i)) for i in range(10)))
    assert len(members(tmp_path / "ten.nemo")) == 10
    entries(tmp_path / "many.nemo", *(entry(str(i)) for i in range(11)))
    with pytest.raises(CheckpointError, match="more than 10 members"):
        members(tmp_path / "many.nemo")


def test_a_long_chain_of_long_names_is_no_recursion(tmp_path):
    """Python's reader calls itself for each of them."""
    chain = b"".join(entry("././@LongLink", b"L").tobuf(tarfile.GNU_FORMAT) for _ in range(5000))
    (tmp_path / "chain.nemo").write_bytes(chain + entry("x").tobuf() + b"\0" * 1024)
    with pytest.raises(CheckpointError):
        members(tmp_path / "chain.nemo")


# --- fuzz

BASE = settings(
    max_examples=200,
    deadline=None,  # a shared machine
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def refused_or_read(data: bytes) -> dict[str, bytes] | None:
    """What extraction makes of some bytes; checks that nothing lands outside its folder."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "in.nemo").write_bytes(data)
        (root / "a" / "b" / "out").mkdir(parents=True)
        try:
            extract(root / "in.nemo", root / "a" / "b" / "out")
            found = contents(root / "a" / "b" / "out")
        except CheckpointError:
            found = None
        shutil.rmtree(root / "a" / "b" / "out")
        assert sorted(p.relative_to(root).as_posix() for p in root.rglob("*")) == ["a", "a/b", "in.nemo"]
        return found


def names(data: bytes) -> set[str]:
    return {member.name for member in tar.TarReader(io.BytesIO(data), Path("mutated"))}


@BASE
@given(st.binary(max_size=4096), st.sampled_from(["", "gzip", "tail"]))
def test_random_bytes_are_refused(data, wrapping):
    if wrapping == "gzip":
        data = gzip.compress(data)
    elif wrapping == "tail":
        data = entry("x", size=len(data)).tobuf() + data
    found = refused_or_read(data)
    assert found is None or set(found) <= {"x"}


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid")
    pack(fill(folder / "source"), folder / "ours.nemo")
    return {
        "ours": (folder / "ours.nemo").read_bytes(),
        "gnu": foreign(folder / "gnu.nemo", format=tarfile.GNU_FORMAT).read_bytes(),
        "gzip": foreign(folder / "gz.nemo", mode="w:gz").read_bytes(),
    }


@BASE
@given(st.data())
def test_a_mutated_archive_is_refused_or_read_as_it_was(valid, data):
    """Ours: nothing but the true contents ever comes out. NeMo's have no checksums of data, so that may differ."""
    which = data.draw(st.sampled_from(sorted(valid)))
    mutated = bytearray(valid[which])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.sampled_from(["set", "cut", "drop", "double", "header"])):
            case "set":
                mutated[place] = data.draw(st.integers(0, 255))
            case "cut":
                del mutated[place:]
                mutated += b"\0" * data.draw(st.sampled_from([0, 1, 512, 1024]))
            case "drop":
                del mutated[place // 512 * 512 : place // 512 * 512 + 512]
            case "double":
                mutated[place:place] = mutated[place // 512 * 512 : place // 512 * 512 + 512]
            case "header":  # a field changed and the checksum with it
                start = place // 512 * 512
                header = bytearray(mutated[start : start + 512].ljust(512, b"\0"))
                header[data.draw(st.integers(0, 511))] = data.draw(st.integers(0, 255))
                header[148:156] = b" " * 8
                header[148:156] = b"%06o\0 " % sum(header)
                mutated[start : start + 512] = header
        if not mutated:
            break
    found = refused_or_read(bytes(mutated))
    if which == "ours" and found is not None and "manifest.json" in names(bytes(mutated)):
        assert found == FILES
