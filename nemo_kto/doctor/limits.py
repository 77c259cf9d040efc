"""Limits that containers and shells set, and that large jobs run into: shared memory, open files, locked memory."""

from __future__ import annotations

import os
import resource
import tempfile
from pathlib import Path

from nemo_kto.doctor.findings import Finding

_GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
SMALL_SHARED_MEMORY = _GIB
"""Bytes. Containers get 64 MiB by default, and NVIDIA's documentation asks for 1 GiB or more."""
FEWEST_FILES = 256
"""Open files below which a run is taken to fail even alone on its machine. An estimate, not a measurement."""
FEW_FILES = 4096


def needed_files(world_size: int) -> int:
    """Open files that a rank should be allowed.

    One connection to each other rank in each of gloo's groups that span the job (Megatron makes about 8), and 1024 for
    everything else.
    """
    return max(FEW_FILES, 1024 + 8 * world_size)


def probe(world_size: int = 1, shared_memory: Path = SHARED_MEMORY) -> Finding:
    """Look at this process's limits, which what it starts inherits."""
    finding = Finding("limits", "limits")
    _shared_memory(finding, shared_memory)
    _files(finding, needed_files(world_size))
    _locked(finding)
    return finding


def _shared_memory(finding: Finding, path: Path) -> None:
    try:
        stat = os.statvfs(path)
        with tempfile.NamedTemporaryFile(dir=path, prefix="nemo_kto_doctor_") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        finding.facts["shared_memory"] = {"path": str(path), "error": error.strerror}
        finding.lines.append(f"{path}: {error.strerror}")
        finding.wrong(
            f"{path} cannot be used ({error.strerror})",
            "processes that build batches, checkpoint writers and NCCL pass data through it",
            "mount it: docker run --shm-size=8g, or mount -t tmpfs tmpfs /dev/shm",
            blocks=True,
        )
        return
    total, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    finding.facts["shared_memory"] = {"path": str(path), "total_bytes": total, "free_bytes": free}
    finding.lines.append(f"{path}: {total / _GIB:.2f} GiB, {free / _GIB:.2f} free")
    if total < SMALL_SHARED_MEMORY:
        finding.wrong(
            f"{path} has {total / 2**20:.0f} MiB",
            "NCCL within a node and processes that build batches pass data through it; too little of it ends them "
            "with SIGBUS in mid-run",
            "docker run --shm-size=8g, or --ipc=host; Kubernetes: an emptyDir in memory; or model.data.num_workers=0",
        )


def _files(finding: Finding, needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    finding.facts["open_files"] = {"soft": soft, "hard": hard, "needed": needed}
    shown = ["unlimited" if limit == resource.RLIM_INFINITY else str(limit) for limit in (soft, hard)]
    finding.lines.append(f"open files: {shown[0]} (up to {shown[1]} with ulimit -n)")
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    raisable = hard == resource.RLIM_INFINITY or hard >= needed
    finding.wrong(
        f"a process may hold {soft} files open, and {needed} are advisable here",
        "connections to other ranks, data files and workers each hold some; beyond the limit a run ends with 'too "
        "many open files'",
        f"ulimit -n {needed}"
        if raisable
        else f"the hard limit is {hard}: raise it in /etc/security/limits.conf, in slurmd's unit (LimitNOFILE=), or "
        f"with docker run --ulimit nofile={max(65536, needed)}",
        blocks=soft < FEWEST_FILES,
    )


def _locked(finding: Finding) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    finding.facts["locked_memory_bytes"] = None if unlimited else soft
    finding.lines.append(f"locked memory: {'unlimited' if unlimited else f'{soft / 2**20:.0f} MiB'}")
    if not unlimited and any(Path("/sys/class/infiniband").glob("*")):
        finding.wrong(
            f"a process may lock {soft / 2**20:.0f} MiB of memory",
            "InfiniBand registers what it sends, and NCCL fails or falls back to TCP without",
            "ulimit -l unlimited; docker run --ulimit memlock=-1; Slurm: PropagateResourceLimitsExcept=MEMLOCK",
        )
