"""Archives for tests: ours, NeMo 1.x's, and single tar members of every kind."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

FILES = {"model_config.yaml": b"a: 1\n", "model_weights/__0_0.distcp": bytes(range(256)) * 40, "hf/empty": b""}


def fill(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def foreign(path: Path, files: dict[str, bytes] = FILES, mode: str = "w", **options) -> Path:
    """An archive as NeMo 1.x makes it: one ``tar.add`` of a folder as ``.``; no manifest."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(path, mode, **options) as archive:
        archive.add(fill(Path(folder)) if files is FILES else fill(Path(folder), files), arcname=".")
    return path


def entries(path: Path, *infos: tarfile.TarInfo, mode: str = "w") -> Path:
    """An archive of single members, each with as many bytes of ``x`` as it says."""
    with tarfile.open(path, mode) as archive:
        for info in infos:
            archive.addfile(info, io.BytesIO(b"x" * info.size))
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info
