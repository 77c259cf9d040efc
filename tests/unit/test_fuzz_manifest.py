"""Any manifest of a checkpoint: a verdict that is right, or an error of ours. Nothing outside the folder is read."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz_kit  # noqa: F401 - how to search
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_kto.config import manifest
from nemo_kto.errors import CheckpointError

CONTENTS = {"run.json": b"{}", "__0_0.distcp": b"weights", "hf/config.json": b'{"vocab_size": 1}', "empty": b""}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text("./a\\\0 ~", max_size=8) | st.sampled_from(
    [
        *("run.json", "hf", "hf/config.json", "./run.json", "hf/../run.json", "nothing", "manifest.json", "a" * 300),
        *("../secret", "/etc/passwd", "hf/../../secret", "link", "folder_link/secret", "~/x", "//run.json", "\ud800"),
    ]
)
OUTSIDE = b"not part of the checkpoint"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole checkpoint; beside it a file that is none of its business, and links to it."""
    folder = tmp_path_factory.mktemp("run") / "step-000001"
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest.complete(folder, {})
    (folder.parent / "secret").write_bytes(OUTSIDE)
    (folder / "link").symlink_to(folder.parent / "secret")
    (folder / "folder_link").symlink_to(folder.parent)
    return folder


@contextlib.contextmanager
def opened() -> Iterator[list[str]]:
    """Real paths of everything that is opened meanwhile."""
    paths: list[str] = []
    original = io.open

    def spy(file: Any, *arguments: Any, **more: Any) -> Any:
        paths.append(os.path.realpath(file))
        return original(file, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", spy)
        yield paths


def judge(folder: Path, text: str | bytes) -> list[str]:
    """What ``problems`` says of a manifest, all readers of it agreeing."""
    (folder / manifest.MANIFEST).write_bytes(
        text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    )
    found = manifest.problems(folder)
    assert all(isinstance(line, str) and str(folder) in line for line in found)
    if any(re.search(r"cannot be read: \w+: |has format|outside its directory", line) for line in found):
        for reader in (manifest.read, manifest.identity):
            with pytest.raises(CheckpointError) as caught:
                reader(folder)
            assert found == [str(caught.value)]
        assert not manifest.sizes_match(folder)
    else:
        assert re.fullmatch("[0-9a-f]{64}", manifest.identity(folder))
        assert manifest.sizes_match(folder) or found, "a file of another length is a problem"
    shares = [manifest.problems(folder, part=part, parts=3) for part in range(3)]
    assert {line for share in shares for line in share} == set(found)
    return found


def written() -> dict[str, Any]:
    files = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in CONTENTS.items()}
    return {"format": 1, "files": files}


def test_what_was_written_is_whole(folder):
    assert judge(folder, json.dumps(written())) == []


@given(data=st.binary(max_size=80))
def test_any_bytes(folder, data):
    assert judge(folder, data), "no such text names the files that are there"


@given(value=ANY_JSON)
def test_any_json(folder, value):
    found = judge(folder, json.dumps(value))
    assert found or (value["format"] == 1 and not value["files"])


@given(place=st.integers(0, 10**4), change=st.integers(1, 255))
def test_any_flipped_byte(folder, place, change):
    """Whole only where the manifest still says the same."""
    data = bytearray(json.dumps(written()).encode())
    data[place % len(data)] ^= change
    if not judge(folder, bytes(data)):
        assert json.loads(data) == written()


@given(cut=st.integers(1, 10**4))
def test_any_cut(folder, cut):
    text = json.dumps(written())
    assert judge(folder, text[: -(cut % len(text)) - 1])


@settings(max_examples=600)  # few of many names are worth anything
@given(
    names=st.dictionaries(
        NAMES, st.sampled_from(["right", "secret", "long", "odd"]) | ANY_JSON, min_size=1, max_size=3
    )
)
def test_no_name_leads_outside(folder, names):
    records = {
        "right": written()["files"]["run.json"],
        "secret": {"bytes": len(OUTSIDE), "sha256": hashlib.sha256(OUTSIDE).hexdigest()},
        "long": {"bytes": 2**70, "sha256": "0" * 64},
        "odd": {"bytes": -1, "sha256": ""},
    }
    files = {name: records.get(kind, kind) if isinstance(kind, str) else kind for name, kind in names.items()}
    with opened() as paths:
        found = judge(folder, json.dumps({"format": 1, "files": files}))
    assert paths
    inside = os.path.realpath(folder) + os.sep
    assert [path for path in paths if not path.startswith(inside)] == []
    harmless = {"run.json", "./run.json", "hf/../run.json"}
    if not found:
        assert set(names) <= harmless
