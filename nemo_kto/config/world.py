"""How many processes there are, as the launcher's environment tells. Reads no config and starts nothing."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from nemo_kto.errors import ConfigError

LISTEN_FD = "NEMO_KTO_LISTEN_FD"
"""Environment variable: a socket that already listens at the meeting point, for rank 0 to serve."""


@dataclass(frozen=True)
class World:
    """This process among all of the job. ``launched`` is False when nobody started more than this one."""

    rank: int
    size: int
    local_size: int
    """Processes on this node."""
    launched: bool
    local_rank: int = 0
    """This process among those of its node; also the CUDA device it takes where it sees several."""

    @property
    def node_rank(self) -> int:
        """This node among the job's, for launchers that number ranks node by node."""
        return self.rank // self.local_size

    @property
    def num_nodes(self) -> int:
        """Nodes of the job."""
        return self.size // self.local_size


def world_from_environment() -> World:
    """Read ``torchrun``'s variables, else Slurm's (one task per rank), else assume one process.

    Raises:
        ConfigError: the variables contradict each other.
    """
    env = os.environ
    if "WORLD_SIZE" in env and "RANK" in env:
        local = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "WORLD_SIZE"
        rank = _number("RANK")
        return _world(rank, _number("WORLD_SIZE"), _number(local), _number("LOCAL_RANK", rank % _number(local)))
    if "SLURM_PROCID" in env and "SLURM_NTASKS" in env and env.get("SLURM_STEP_ID", "") not in ("", "4294967290"):
        size, nodes = _number("SLURM_NTASKS"), _number("SLURM_NNODES") if "SLURM_NNODES" in env else 1
        return _world(_number("SLURM_PROCID"), size, max(1, size // max(1, nodes)), _number("SLURM_LOCALID", 0))
    for name, alone, other in (("WORLD_SIZE", "1", "RANK"), ("RANK", "0", "WORLD_SIZE")):
        if env.get(name, alone) != alone:
            raise ConfigError(f"{name}={env[name]} in the environment, but no {other}: launchers set both or neither")
    return World(rank=0, size=1, local_size=1, launched=False)


def meeting_point() -> tuple[str, int]:
    """Address and port where rank 0 waits for the others: the launcher's, else what a Slurm step's tasks all derive.

    Raises:
        ConfigError: there is neither.
    """
    env = os.environ
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        return env["MASTER_ADDR"], _number("MASTER_PORT")
    if "SLURM_JOB_ID" not in env or "SLURM_STEP_NODELIST" not in env:
        raise ConfigError(
            "several processes but no MASTER_ADDR and MASTER_PORT: start them with torchrun, or set both"
        )
    # "node[3-5,9],other" begins with node3
    first = re.match(r"([^,\[]+)(?:\[([^-,\]]+))?", env["SLURM_STEP_NODELIST"])
    assert first is not None
    port = 15000 + (_number("SLURM_JOB_ID") * 10 + _number("SLURM_STEP_ID", 0) % 10) % 10000
    return env.get("MASTER_ADDR", first[1] + (first[2] or "")), _number("MASTER_PORT", port)


def _number(name: str, absent: int | None = None) -> int:
    if absent is not None and name not in os.environ:
        return absent
    try:
        return int(os.environ[name])
    except ValueError:
        raise ConfigError(
            f"{name}={os.environ[name]!r} in the environment is no number; the launcher sets it"
        ) from None


def _world(rank: int, size: int, local_size: int, local_rank: int) -> World:
    if not 0 <= rank < size or local_size < 1 or size % local_size or not 0 <= local_rank < local_size:
        raise ConfigError(
            f"the launcher's environment is inconsistent: rank {rank}, world size {size}, {local_size} per node"
        )
    return World(rank, size, local_size, launched=True, local_rank=local_rank)
