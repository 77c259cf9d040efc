"""What launchers have told this process, and over which interface its ranks would talk."""

from __future__ import annotations

import os
import re
import socket

from nemo_kto.config import network
from nemo_kto.config.world import World, meeting_point, unused_tasks, world_from_environment
from nemo_kto.doctor.findings import Finding
from nemo_kto.errors import ConfigError

_PREFIXES = ("NCCL_", "GLOO_", "TORCHELASTIC_", "TORCH_NCCL_", "UCX_", "OMP_")
_EXPORT = "SLURM_EXPORT_ENV"
_NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "NVIDIA_VISIBLE_DEVICES"),
    *("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_NNODES", "SLURM_NODELIST", "SLURM_NODEID", "SLURM_NTASKS"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_DISTRIBUTION"),
    *("SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE", "SLURM_RESTART_COUNT", "SLURM_CPUS_PER_TASK", _EXPORT),
    *("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "PYTORCH_CUDA_ALLOC_CONF", "PYTHONPATH"),
)
"""Names in full: the environment may hold credentials, of Slurm's too, and a report is passed on."""


def probe() -> Finding:
    """The launcher's environment, as nemo_kto reads it."""
    finding = Finding("launcher", "launcher")
    environment = {
        name: value
        for name, value in sorted(os.environ.items())
        if name in _NAMES or (name.startswith(_PREFIXES) and "TOKEN" not in name and "KEY" not in name)
    }
    _judge_export(finding, environment)
    finding.facts["environment"] = environment
    try:
        world = world_from_environment()
    except ConfigError as error:
        finding.lines.append(f"contradictory: {error}")
        finding.wrong(
            f"the launcher's environment is refused: {error}",
            "ranks could not find each other",
            "mend it as it says, or start without these variables",
            blocks=True,
        )
        return finding
    finding.facts["world"] = {
        **{"rank": world.rank, "size": world.size, "local_rank": world.local_rank, "local_size": world.local_size},
        **{"node_rank": world.node_rank, "num_nodes": world.num_nodes, "launcher": world.launcher},
    }
    nodes = "1 node" if world.num_nodes == 1 else f"{world.num_nodes} nodes"
    finding.lines.append(
        f"world {world.size} = {nodes} x {world.local_size} ({world.launcher}); this is rank {world.rank}"
    )
    _judge(finding, world)
    shown = {name: value for name, value in environment.items() if not name.startswith("TORCHELASTIC")}
    finding.lines += [f"{name}={value}" for name, value in shown.items()]
    return finding


def interfaces() -> Finding:
    """Network interfaces, and which of them gloo and NCCL would take."""
    finding = Finding("network", "network")
    try:
        here = network.interfaces()
    except Exception as error:  # psutil may be broken, and sandboxes refuse the question
        finding.lines.append(f"interfaces cannot be listed: {error}")
        return finding
    gloo, nccl = network.gloo_interface(), network.nccl_interface()
    finding.facts = {
        "hostname": socket.gethostname(),
        "interfaces": [
            {"name": one.name, "addresses": list(one.addresses), "megabits_per_second": one.megabits} for one in here
        ],
        "gloo": gloo,
        "nccl": nccl,
    }
    finding.lines.append(f"this host: {socket.gethostname()}")
    for one in here:
        speed = f", {one.megabits / 1000:g} Gbit/s" if one.megabits else ""
        finding.lines.append(f"{one.name}: {', '.join(one.addresses)}{speed}")
    by = "GLOO_SOCKET_IFNAME" if os.environ.get(network.GLOO_INTERFACE) else "by this host's name"
    finding.lines.append(f"gloo: {gloo or 'none found'} ({by})")
    finding.lines.append(f"NCCL: {f'{nccl} (NCCL_SOCKET_IFNAME)' if nccl else 'chooses by itself'}")
    _judge_interfaces(finding, here, gloo, nccl)
    return finding


def _judge(finding: Finding, world: World) -> None:
    left = unused_tasks(world)
    if left is not None:
        finding.wrong(left, "the rest of the allocation would stand idle", "srun nemo-kto ...")
    if world.size > 1:
        try:
            finding.lines.append("meeting point: {}:{}".format(*meeting_point()))
        except ConfigError as error:
            finding.wrong(
                str(error), "ranks meet there", "export MASTER_ADDR and MASTER_PORT, or use torchrun", blocks=True
            )
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        finding.wrong(
            f"torchrun --max-restarts={restarts} without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            "a restarted rank would read the addresses of the attempt before, and every restart would fail",
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node, with --rdzv-backend=c10d",
        )


def _judge_export(finding: Finding, environment: dict[str, str]) -> None:
    """Slurm sets the variable in a job that was submitted with --export, and every srun in that job obeys it."""
    words = _exported(environment.get(_EXPORT, ""))
    if not words:
        return
    shown = environment[_EXPORT] = ",".join(words)
    if "ALL" in (word.upper() for word in words):
        return
    none = shown.upper() in ("NONE", "NIL")
    passed = "no variables but Slurm's own" if none else "only these variables, and Slurm's own"
    finding.wrong(
        f"{_EXPORT}={shown}: srun passes on {passed}",
        "what else the batch script exports does not reach the ranks (PATH, PYTHONPATH, MASTER_ADDR, NCCL_...)",
        f"export {_EXPORT}=ALL in the batch script, before srun",
    )


def _exported(value: str) -> list[str]:
    """Names alone: a value that is given with a name may be a credential, and may hold commas where it is quoted."""
    bare = re.sub(r"""'[^']*'?|"[^"]*"?""", "...", value)
    words = [word.strip().partition("=") for word in bare.split(",")]
    return [f"{name}=..." if given else name for name, given, _ in words if name]


def _judge_interfaces(finding: Finding, here: list[network.Interface], gloo: str | None, nccl: str | None) -> None:
    names = {one.name for one in here}
    for variable, value in ((network.GLOO_INTERFACE, gloo), (network.NCCL_INTERFACE, nccl)):
        exact = value is not None and os.environ.get(variable) and not value.startswith(("^", "="))
        if exact and not any(name.startswith(part) for part in str(value).split(",") for name in names):
            finding.wrong(
                f"{variable}={value}, and there is no such interface: {', '.join(sorted(names))}",
                "ranks could not talk",
                f"unset {variable}, or name one of these",
                blocks=True,
            )
    out = [one.name for one in here if one.leads_out]
    several = max(_counted(name) for name in ("SLURM_JOB_NUM_NODES", "GROUP_WORLD_SIZE")) > 1
    if out and gloo not in out and not os.environ.get(network.GLOO_INTERFACE):
        if not several:
            finding.lines.append(f"for jobs of several nodes: export GLOO_SOCKET_IFNAME={out[0]}")
            return
        finding.wrong(
            f"this host's name means loopback, so gloo would take {gloo}",
            "other nodes could not reach it; a training sets GLOO_SOCKET_IFNAME where the way to rank 0 is clear",
            f"export GLOO_SOCKET_IFNAME={out[0]}",
        )


def _counted(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else 1
