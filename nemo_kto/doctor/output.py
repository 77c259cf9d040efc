"""Whether a run could write where it is to write: done as a run does it, and leaving nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from nemo_kto.config.log_dir import check_log_dir
from nemo_kto.doctor.findings import Finding
from nemo_kto.errors import ConfigError

_BYTES = 16 * 2**20
_GIB = 2**30
_SMALL = 20 * _GIB
_LAYERED = ("overlay", "aufs")
_LOCK = """\
import fcntl, sys
with open(sys.argv[1], "a+") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        sys.exit(11)
sys.exit(0)
"""
"""What another run would do with a directory that is in use; it must fail."""


def probe(directory: Path, *, asked: bool) -> Finding:
    """Write, force to the disk, rename, lock.

    Args:
        directory: where a run would write.
        asked: whether the user named it. The default in an unwritable place is a warning only: runs name another.
    """
    finding = Finding("output", "output directory")
    finding.facts = {"path": str(directory.absolute()), "asked": asked, "writable": False}
    made = _missing(directory)
    try:
        check_log_dir(directory)
        _write(finding, directory)
        _lock(finding, directory)
        _space(finding, directory)
    except (ConfigError, OSError) as error:
        said = str(error) if isinstance(error, ConfigError) else f"{directory}: {error.strerror or error}"
        finding.lines.append(f"{directory}: cannot be used: {said}")
        finding.wrong(
            said,
            "metrics, checkpoints and the reference's weights go there",
            "exp_manager.explicit_log_dir=DIR, one that this user may write to; nemo-kto doctor --output DIR tries it",
            blocks=asked,
        )
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
    return finding


def _missing(directory: Path) -> list[Path]:
    """What has to be made for it, innermost first."""
    chain = [directory.absolute(), *directory.absolute().parents]
    return [folder for folder in chain if not folder.exists()]


def _write(finding: Finding, directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory, prefix=".doctor_") as folder:
        draft, final = Path(folder) / "draft.partial", Path(folder) / "final"
        data = os.urandom(2**20)
        began = time.monotonic()
        with draft.open("wb") as file:
            for _ in range(_BYTES // len(data)):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(final)
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)
        seconds = time.monotonic() - began
        whole = final.stat().st_size == _BYTES and not draft.exists()
    speed = _BYTES / seconds
    finding.facts |= {"writable": whole, "bytes_per_second": speed}
    finding.lines.append(f"{directory}: written, forced to the disk and renamed, {speed / 1e6:.0f} MB/s")


def _lock(finding: Finding, directory: Path) -> None:
    import fcntl

    path = directory / f".doctor_lock_{os.getpid()}"
    try:
        with path.open("a+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                finding.facts["locks"] = False
                _no_locks(finding, directory, error.strerror or str(error))
                return
            other = subprocess.run([sys.executable, "-S", "-c", _LOCK, str(path)], check=False, timeout=60)
            finding.facts["locks"] = other.returncode == 11
            if other.returncode == 11:
                finding.lines.append("locks keep a second run out")
            else:
                _no_locks(finding, directory, "a second process got a lock that was held")
    finally:
        path.unlink(missing_ok=True)


def _no_locks(finding: Finding, directory: Path, why: str) -> None:
    finding.lines.append(f"no file locks: {why}")
    finding.wrong(
        f"{directory}: files cannot be locked ({why})",
        "two runs in one directory would not notice each other, and destroy each other's checkpoints",
        "see to it that no two runs share a directory; Lustre: mount with -o flock",
    )


def _space(finding: Finding, directory: Path) -> None:
    stat = os.statvfs(directory)
    free = stat.f_bavail * stat.f_frsize
    kind = _filesystem(directory)
    finding.facts |= {"free_bytes": free, "free_files": stat.f_favail, "filesystem": kind}
    finding.lines.append(f"free: {free / _GIB:.1f} GiB ({kind})")
    if free < _SMALL:
        finding.wrong(
            f"{free / _GIB:.1f} GiB are free at {directory}",
            "a full checkpoint takes 14 bytes per parameter (98 GB for 7 B), and two are kept by default",
            "name a larger disk (exp_manager.explicit_log_dir), or keep fewer "
            "(exp_manager.checkpoint_callback_params.save_last_k=1)",
        )
    if kind in _LAYERED:
        finding.wrong(
            f"{directory} is inside the container's own file system",
            "it goes when the container ends, and the checkpoints with it",
            "mount a directory: srun --container-mounts=DIR:DIR, docker run -v DIR:DIR",
        )
    elif kind in ("tmpfs", "ramfs"):
        finding.wrong(
            f"{directory} is in memory ({kind})",
            "it goes when the machine stops, and uses the memory that the run needs",
            "name a directory on a disk",
        )


def _filesystem(directory: Path) -> str:
    """Kind of the mount that holds it, of those with the longest path."""
    place = str(directory.resolve())
    best, kind = "", "unknown"
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, mount, found, *_ = line.split()
            inside = place == mount or place.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= len(best):
                best, kind = mount, found
    return kind
