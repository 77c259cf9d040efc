"""How much memory the kernel's control groups leave to this process, those of a Slurm job as well as a container's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_NO_LIMIT = 2**60  # the old interface writes a huge number where the new one writes "max"


def memory_limit(root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """The smallest limit of this process's control groups, in bytes; None where none of them has any.

    A group's limit holds for all groups in it, so all are read from its own one up to the root.

    Args:
        root: where the groups are mounted.
        own: the process's groups, as ``/proc/self/cgroup`` lists them.
    """
    limits = []
    for file in _files(root, own):
        with suppress(OSError, ValueError):  # absent, unreadable, or "max"
            limits.append(int(file.read_text()))
    return min((limit for limit in limits if 0 < limit < _NO_LIMIT), default=None)


def _files(root: Path, own: Path) -> Iterator[Path]:
    """Files that may hold a limit; those that are there depend on the version of the interface."""
    listed = ["0::/", "0:memory:/"]
    with suppress(OSError, ValueError):
        listed += [line for line in own.read_text().splitlines() if line.count(":") >= 2]
    for line in listed:
        _, controllers, path = line.split(":", 2)
        for group in _upwards(path):
            if not controllers:
                yield root / group / "memory.max"
                yield root / "unified" / group / "memory.max"  # where both versions are mounted
            elif "memory" in controllers.split(","):
                yield root / "memory" / group / "memory.limit_in_bytes"


def _upwards(path: str) -> Iterator[str]:
    """A group, the one that it is in, and so on to the root; a container may not see all of them.

    A path with ``..`` lies outside of what is mounted here.
    """
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        parts = []
    for length in range(len(parts), -1, -1):
        yield "/".join(parts[:length])
