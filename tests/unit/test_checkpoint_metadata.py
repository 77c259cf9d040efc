"""A checkpoint's index is data, or it is refused before anything in it runs."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata, Metadata

from nemo_kto.checkpoint.metadata import check_metadata
from nemo_kto.errors import CheckpointError


class _Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_an_index_that_runs_code_is_refused_and_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Hostile(mark)))
    with pytest.raises(CheckpointError, match=r"\.metadata asks for .*it may run code"):
        check_metadata(tmp_path, [])
    assert not mark.exists()


@pytest.mark.parametrize("name", ["operator.attrgetter", "operator", "reduce", "dataclass"])
def test_what_torchs_modules_import_is_not_within_reach(tmp_path, name):
    call = b"\x80\x04\x8c%c" % len("torch.distributed.checkpoint.planner") + b"torch.distributed.checkpoint.planner"
    (tmp_path / ".metadata").write_bytes(call + b"\x8c%c" % len(name) + name.encode() + b"\x93.")
    with pytest.raises(CheckpointError, match="it may run code"):
        check_metadata(tmp_path, [])


class _Attribute:
    """Pickled as Python 3.11.2 pickles a member of an enum."""

    def __init__(self, of: object, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self):
        return getattr, (self.of, self.name)


def test_a_member_of_an_enum_may_be_asked_for_by_name(tmp_path):
    _index(tmp_path, weight=_Attribute(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT"))
    check_metadata(tmp_path, ["weight"])


@pytest.mark.parametrize(
    ("of", "name"),
    [
        (Metadata, "__init__"),
        (_MEM_FORMAT_ENCODING, "__class__"),
        (_MEM_FORMAT_ENCODING, "__members__"),
        ("text", "join"),
    ],
)
def test_no_other_attribute_may(tmp_path, of, name):
    _index(tmp_path, weight=_Attribute(of, name))
    with pytest.raises(CheckpointError, match=r"asks for builtins\.getattr of .*it may run code"):
        check_metadata(tmp_path, ["weight"])


@pytest.mark.parametrize("content", [None, b"", b"not a pickle"])
def test_a_missing_or_damaged_index_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        check_metadata(tmp_path, [])


def _index(path: Path, **entries: object) -> None:
    storage = {f"{name}-place": _StorageInfo(f"{name}.distcp", 0, 1) for name in entries}
    (path / ".metadata").write_bytes(pickle.dumps(Metadata(dict(entries), storage_data=storage)))


def test_a_pickled_object_in_place_of_a_tensor_is_refused(tmp_path):
    """torch unpickles what the index calls bytes, whatever was asked for."""
    _index(tmp_path, weight=BytesStorageMetadata(), other=BytesStorageMetadata())
    check_metadata(tmp_path, ["bias"])
    with pytest.raises(CheckpointError, match="pickled object where the tensor weight belongs"):
        check_metadata(tmp_path, ["bias", "weight"])


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/passwd"])
def test_an_index_that_points_out_of_the_checkpoint_is_refused(tmp_path, name):
    _index(tmp_path, **{name.removesuffix(".distcp"): BytesStorageMetadata()})
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        check_metadata(tmp_path, [])
