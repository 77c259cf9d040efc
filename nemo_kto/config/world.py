"""How many processes there are, as the launcher's environment tells. Reads no config and starts nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nemo_kto.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among all of the job. ``launched`` is False when nobody started more than this one."""

    rank: int
    size: int
    local_size: int
    """Processes on this node."""
    launched: bool

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
        return _world(_number("RANK"), _number("WORLD_SIZE"), _number(local))
    if "SLURM_PROCID" in env and "SLURM_NTASKS" in env and env.get("SLURM_STEP_ID", "") not in ("", "4294967290"):
        size, nodes = _number("SLURM_NTASKS"), _number("SLURM_NNODES") if "SLURM_NNODES" in env else 1
        return _world(_number("SLURM_PROCID"), size, max(1, size // max(1, nodes)))
    return World(rank=0, size=1, local_size=1, launched=False)


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ConfigError(
            f"{name}={os.environ[name]!r} in the environment is no number; the launcher sets it"
        ) from None


def _world(rank: int, size: int, local_size: int) -> World:
    if not 0 <= rank < size or local_size < 1 or size % local_size:
        raise ConfigError(
            f"the launcher's environment is inconsistent: rank {rank}, world size {size}, {local_size} per node"
        )
    return World(rank, size, local_size, launched=True)
