"""How many processes there are, as the launcher's environment tells. Reads no config and starts nothing."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from nemo_kto.errors import ConfigError
from nemo_kto.parents import STARTED_BY

LISTEN_FD = "NEMO_KTO_LISTEN_FD"
"""Environment variable: a socket that already listens at the meeting point, for rank 0 to serve."""

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm numbers what is no step of ours from the top: batch scripts, the shells of ``salloc``, containers."""


BY_HAND = "RANK and WORLD_SIZE in the environment"
"""Launcher of a rank that none of those known here has started; perhaps nobody has."""


@dataclass(frozen=True)
class World:
    """This process among all of the job. ``launched`` is False when nobody started more than this one."""

    rank: int
    size: int
    local_size: int
    """Processes on this node, and on every other one."""
    launched: bool
    local_rank: int = 0
    """This process among those of its node; also the CUDA device it takes where it sees several."""
    node_rank: int = 0
    """This node among the job's. Slurm may deal ranks out to nodes in turn, so it does not follow from the rank."""
    launcher: str = "alone"
    """What started the processes, for people to read."""

    @property
    def num_nodes(self) -> int:
        """Nodes of the job."""
        return self.size // self.local_size


def world_from_environment() -> World:
    """Read ``torchrun``'s variables, else Slurm's (one task per rank), else assume one process.

    The first win where ``srun`` starts ``torchrun``. A batch script, a shell of ``salloc`` and a step of one task are
    one process, whatever the job has been allotted.

    Raises:
        ConfigError: the variables contradict each other, or the nodes have unequal numbers of processes.
    """
    env = os.environ
    if "WORLD_SIZE" in env and "RANK" in env:
        return _by_torchrun()
    if _is_step() and _either("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", 1) > 1:
        return _by_srun()
    for name, alone, other in (("WORLD_SIZE", "1", "RANK"), ("RANK", "0", "WORLD_SIZE")):
        if env.get(name, alone) != alone:
            raise ConfigError(f"{name}={env[name]} in the environment, but no {other}: launchers set both or neither")
    return World(rank=0, size=1, local_size=1, launched=False)


def unused_tasks(world: World) -> str | None:
    """What to tell whose Slurm job has room for more processes than this one; None where all is as it should be.

    The usual reason is a batch script without ``srun``.
    """
    env = os.environ
    if world.launched or _is_step() or "SLURM_JOB_ID" not in env:
        return None
    tasks, nodes = _either("SLURM_NTASKS", "SLURM_NPROCS", 1), _either("SLURM_JOB_NUM_NODES", "SLURM_NNODES", 1)
    if max(tasks, nodes) < 2:
        return None
    return (
        f"Slurm job {env['SLURM_JOB_ID']} has {nodes} node(s) and {max(tasks, nodes)} task(s), and this is one "
        "process that uses one of them: put srun before the command"
    )


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


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form, such as ``2(x3),1``, as [2, 2, 2, 1].

    Raises:
        ConfigError: it is no such thing.
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            raise ConfigError(
                f"Slurm's tasks per node are {text!r} in the environment, which is not like 2(x3),1; srun sets them"
            )
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _by_torchrun() -> World:
    env = os.environ
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    local_size = _number("LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "WORLD_SIZE")
    nodes = _number("GROUP_WORLD_SIZE", 0)  # torchrun's word for its agents, one of which runs on each node
    if nodes > 0 and nodes * local_size != size:
        raise ConfigError(
            f"world {size} on {nodes} nodes is not {local_size} processes, as here, on each: {nodes} x {local_size} = "
            f"{nodes * local_size}. Start every torchrun with the same --nproc-per-node"
        )
    launcher = BY_HAND
    if STARTED_BY in env:
        launcher = "nemo-kto"
    elif "TORCHELASTIC_RUN_ID" in env:
        launcher = f"torchrun in Slurm job {env['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in env else "torchrun"
    local_rank = _number("LOCAL_RANK", rank % max(1, local_size))
    node_rank = _number("GROUP_RANK", rank // max(1, local_size))
    return _checked(World(rank, size, local_size, True, local_rank, node_rank, launcher))


def _by_srun() -> World:
    env = os.environ
    rank, size = _number("SLURM_PROCID"), _either("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", 1)
    nodes = max(1, _either("SLURM_STEP_NUM_NODES", "SLURM_NNODES", 1))
    text = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE"))
    counts = [size // nodes] if text is None else tasks_per_node(text)
    if len(set(counts)) > 1 or size % nodes:
        raise ConfigError(_uneven(size, nodes, text))
    local_size = max(1, counts[0])
    local_rank = _number("SLURM_LOCALID", rank % local_size)
    node_rank = _number("SLURM_NODEID", rank // local_size)
    launcher = f"srun in Slurm job {env['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in env else "srun"
    return _checked(World(rank, size, local_size, True, local_rank, node_rank, launcher))


def _uneven(size: int, nodes: int, text: str | None) -> str:
    found = "" if text is None else f" as {text}"
    if size % nodes:
        advice = f"{size} = {nodes} x {size // nodes} + {size % nodes}: give srun another --ntasks, or fewer nodes"
    else:
        advice = f"{size} = {nodes} x {size // nodes}: give srun, or sbatch, --ntasks-per-node={size // nodes}"
    return f"srun has put {size} tasks on {nodes} nodes{found}, and every node must run the same number. {advice}"


def _is_step() -> bool:
    """Whether this is a task that ``srun`` started."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in os.environ and step.isdigit() and int(step) < _FIRST_SPECIAL_STEP


def _either(name: str, other: str, absent: int) -> int:
    """The first of two variables that is there; a step's own numbers come before its job's."""
    return _number(name) if name in os.environ else _number(other, absent)


def _number(name: str, absent: int | None = None) -> int:
    if absent is not None and name not in os.environ:
        return absent
    try:
        return int(os.environ[name])
    except ValueError:
        raise ConfigError(
            f"{name}={os.environ[name]!r} in the environment is no number; the launcher sets it"
        ) from None


def _checked(world: World) -> World:
    rank, size, local_size = world.rank, world.size, world.local_size
    contradicts = (
        not 0 <= rank < size
        or local_size < 1
        or size % local_size
        or not 0 <= world.local_rank < local_size
        or not 0 <= world.node_rank < world.num_nodes
    )
    if contradicts:
        raise ConfigError(
            f"the launcher's environment is inconsistent: rank {rank}, world size {size}, {local_size} per node, "
            f"rank {world.local_rank} on node {world.node_rank}"
        )
    return world
