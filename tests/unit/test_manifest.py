"""A checkpoint's manifest: any change of its files is named, and nothing outside the directory is ever looked at."""

from __future__ import annotations

import json

import pytest

from nemo_kto.config import manifest
from nemo_kto.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    here = tmp_path / "step-000001"
    (here / "hf").mkdir(parents=True)
    for number in range(5):
        (here / f"{number}.distcp").write_bytes(bytes(range(number + 1)) * 100)
    (here / "hf" / "config.json").write_text("{}")
    manifest.complete(here, {})
    return here


def test_what_was_written_is_whole(folder):
    assert manifest.problems(folder) == []
    assert manifest.sizes_match(folder)
    assert sorted(manifest.read(folder)) == [*(f"{number}.distcp" for number in range(5)), "hf/config.json"]


def test_shares_of_the_work_add_up(folder):
    for number in range(5):
        (folder / f"{number}.distcp").unlink()
    found = [manifest.problems(folder, part=part, parts=3) for part in range(3)]
    assert sorted(line for lines in found for line in lines) == [
        f"{folder / f'{number}.distcp'} is missing" for number in range(5)
    ]
    assert all(found)


def _flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped": (lambda f: _flip(f / "3.distcp", 17), "3.distcp has changed since it was written", True),
    "cut": (lambda f: (f / "3.distcp").write_bytes(b"x"), "3.distcp has 1 bytes, not 400", False),
    "grown": (lambda f: (f / "3.distcp").write_bytes(bytes(401)), "3.distcp has 401 bytes, not 400", False),
    "lost": (lambda f: (f / "hf" / "config.json").unlink(), "config.json is missing", False),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json", False),
    "cut manifest": (
        lambda f: (f / "manifest.json").write_text('{"format": 1'),
        "manifest.json cannot be read",
        False,
    ),
    "other format": (lambda f: (f / "manifest.json").write_text('{"format": 9}'), "format 9", False),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind, folder):
    harm, said, same_sizes = DAMAGE[kind]
    harm(folder)
    (found,) = manifest.problems(folder)
    assert said in found
    assert manifest.sizes_match(folder) is same_sizes


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "hf/../../secret", "", "a\0b"])
def test_a_name_outside_is_refused(name, folder):
    record = {"bytes": 1, "sha256": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": {name: record}}))
    with pytest.raises(CheckpointError, match="outside its directory"):
        manifest.read(folder)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "{}",
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {"a": 1}}',
        '{"format": 1, "files": {"a": {"bytes": "1", "sha256": "x"}}}',
        '{"format": 1, "files": {"a": {"bytes": true, "sha256": "x"}}}',
        '{"format": 1, "files": {"a": {"bytes": 1}}}',
        "[" * 100_000,
    ],
)
def test_nonsense_is_an_error_of_ours(content, folder):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        manifest.read(folder)


def test_identity_changes_with_any_byte(folder):
    before = manifest.identity(folder)
    _flip(folder / "0.distcp", 0)
    assert manifest.identity(folder) == before, "it is that of what was written"
    manifest.complete(folder, {})
    assert manifest.identity(folder) != before


def test_known_files_are_not_read_again(folder):
    known = {"0.distcp": manifest.FileRecord(7, "f" * 64)}
    manifest.complete(folder, known)
    assert manifest.read(folder)["0.distcp"] == known["0.distcp"]


def test_text_is_replaced_whole(tmp_path):
    path = tmp_path / "latest.txt"
    manifest.write_text(path, "one")
    manifest.write_text(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["latest.txt"]
