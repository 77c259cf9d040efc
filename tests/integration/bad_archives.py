"""``.nemo`` archives with one thing wrong each, made from a good one, and what must be said of them."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from bad_cases import FILES, MODEL, Bad

GOOD = {"archive": (["convert", "to-nemo", "--input", "model", "--output", "good.nemo"], {})}
"""The command that makes the good one."""
CONFIG, WEIGHTS = "model_config.yaml", "model_weights"


def make(here: Path) -> None:
    """Fill ``here`` with bad archives, next to ``good.nemo``."""
    good = (here / "good.nemo").read_bytes()
    (here / "text.nemo").write_text("version https://git-lfs.github.com/spec/v1\n")
    (here / "empty.nemo").touch()
    (here / "folder.nemo").mkdir()
    (here / "cut.nemo").write_bytes(good[: len(good) // 2])
    (here / "flipped.nemo").write_bytes(_flipped(good))
    for name, (change, _) in EDITS.items():
        _rewrite(here / "good.nemo", here / f"{name}.nemo", change)


def _flipped(data: bytes) -> bytes:
    """One bit changed in the middle of the largest member."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        largest = max(archive.getmembers(), key=lambda member: member.size)
    place = largest.offset_data + largest.size // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


Files = dict[str, bytes | tarfile.TarInfo]


def _rewrite(source: Path, target: Path, change: Callable[[Files], object]) -> None:
    with tarfile.open(source) as archive:
        files: Files = {
            member.name.removeprefix("./"): archive.extractfile(member).read()
            for member in archive.getmembers()
            if member.isfile()
        }
    del files["manifest.json"]  # NeMo's own have none; with one, every change would be found by it
    change(files)
    with tarfile.open(target, "w") as archive:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _link(kind: bytes, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo("link")
    member.type, member.linkname = kind, target
    return member


def _config(old: str, new: str) -> Callable[[Files], object]:
    def change(files: Files) -> None:
        text = files[CONFIG].decode()
        assert old in text
        files[CONFIG] = text.replace(old, new).encode()

    return change


def _without(start: str) -> Callable[[Files], object]:
    return lambda files: [files.pop(name) for name in list(files) if name.startswith(start)]


ABSOLUTE = str(Path(tempfile.gettempdir()) / f"nemo_kto_evil_{os.getpid()}")
"""Where a hostile member would go; nothing else makes this file."""
EDITS: dict[str, tuple[Callable[[Files], object], tuple[str, ...]]] = {
    "upwards": (lambda files: files.update({"../evil": b"x"}), ("../evil",)),
    "absolute": (lambda files: files.update({ABSOLUTE: b"x"}), (ABSOLUTE,)),
    "symlink": (lambda files: files.update(link=_link(tarfile.SYMTYPE, "/etc/passwd")), ("link",)),
    "hardlink": (lambda files: files.update(link=_link(tarfile.LNKTYPE, "../x")), ("link",)),
    "device": (lambda files: files.update(link=_link(tarfile.CHRTYPE, "")), ("link",)),
    "no_config": (_without(CONFIG), (CONFIG,)),
    "garbled_config": (lambda files: files.update({CONFIG: b"a: [1\n"}), (CONFIG,)),
    "listed_config": (lambda files: files.update({CONFIG: b"- 1\n"}), (CONFIG,)),
    "code_config": (lambda files: files.update({CONFIG: b"a: !!python/object/apply:os.getpid []\n"}), (CONFIG,)),
    "no_size": (_config("hidden_size:", "hidden_sighs:"), (CONFIG, "hidden_size")),
    "other_size": (_config("num_layers: 4", "num_layers: 3"), ("config.json", "make them agree")),
    "no_weights_at_all": (_without(WEIGHTS), (WEIGHTS,)),
    "no_index": (_without(f"{WEIGHTS}/.metadata"), (".metadata",)),
    "garbled_index_file": (lambda files: files.update({f"{WEIGHTS}/.metadata": b"no pickle"}), (".metadata",)),
    "lost_shard": (_without(f"{WEIGHTS}/__0_0"), ("__0_0.distcp is missing",)),
    "garbled_hf": (lambda files: files.update({"hf/config.json": b"{"}), ("hf/config.json: not valid JSON",)),
    "no_vocabulary_size": (
        lambda files: files.update({"hf/config.json": _no_vocabulary(files["hf/config.json"])}),
        ("hf/config.json: vocab_size",),
    ),
}
"""What is changed in an archive, by its name, and what is said."""


def _no_vocabulary(config: bytes) -> bytes:
    return json.dumps({k: v for k, v in json.loads(config).items() if k != "vocab_size"}).encode()


def _bad(name: str, *says: str) -> Bad:
    words = ("convert", "from-nemo", "--input", f"{name}.nemo", "--output", "exported")
    return Bad(words, FILES, (f"{name}.nemo", *says))


ARCHIVES = {
    "archive: gone": _bad("gone", "No such file"),
    "archive: folder": _bad("folder", "directory"),
    "archive: text": _bad("text"),
    "archive: empty": _bad("empty"),
    "archive: cut": _bad("cut"),
    "archive: flipped": _bad("flipped", "is damaged", "copy the archive again"),
    **{f"archive: {name}": _bad(name, *says) for name, (_, says) in EDITS.items()},
    "archive: train": Bad((f"{MODEL}=cut.nemo",), FILES, ("cut.nemo",)),
    "archive: score": Bad(
        ("score", "--model", "flipped.nemo", "--data", "good.jsonl", "--out", "s.jsonl", "--cache-dir", "cache"),
        FILES,
        ("flipped.nemo", "is damaged", "copy the archive again"),
    ),
}
