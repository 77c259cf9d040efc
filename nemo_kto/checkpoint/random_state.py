"""Random streams of all ranks: taken, put back, and kept as plain tensors. Knows nothing of weights."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.errors import CheckpointError

FILE = "random.safetensors"
"""One tensor per rank and stream, named by its place in the layout and the stream."""
_TRACKER = "megatron."

Streams = dict[str, Tensor]
"""States of one rank's generators by name: uint8 for torch's and Megatron's, int64 for Python's and numpy's."""


def capture() -> Streams:
    """The state of every generator of this process: torch's, CUDA's, Megatron's, Python's and numpy's."""
    streams = {"torch": torch.get_rng_state(), "python": _python(), "numpy": _numpy()}
    if torch.cuda.is_available():
        streams["cuda"] = torch.cuda.get_rng_state()
    streams |= {f"{_TRACKER}{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    return {name: state.clone() for name, state in streams.items()}


def restore(streams: Streams) -> None:
    """Put every generator back to where :func:`capture` found it."""
    torch.set_rng_state(streams["torch"])
    version, *internal = streams["python"].tolist()
    random.setstate((version, tuple(internal), None))
    words = streams["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(words[:-1], dtype=np.uint32), words[-1], 0, 0.0))
    if torch.cuda.is_available() and "cuda" in streams:
        torch.cuda.set_rng_state(streams["cuda"])
    tracked = {name.removeprefix(_TRACKER): s.clone() for name, s in streams.items() if name.startswith(_TRACKER)}
    get_cuda_rng_tracker().set_states(tracked)


def gather(groups: ParallelGroups) -> dict[str, Tensor] | None:
    """The streams of all ranks by rank and name, on world rank 0; None elsewhere. Every rank calls it."""
    mine = {f"{_place(groups)}/{name}": state.numpy() for name, state in capture().items()}
    everyone: list[dict[str, np.ndarray] | None] | None = (
        [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    )
    dist.gather_object(mine, everyone)
    if everyone is None:
        return None
    return {name: torch.from_numpy(state) for one in everyone if one is not None for name, state in one.items()}


def write(streams: dict[str, Tensor], folder: Path) -> None:
    """Write what :func:`gather` returned."""
    (folder / FILE).write_bytes(save(streams))  # safetensors' own writer makes files that only their owner can read


def read(folder: Path, groups: ParallelGroups) -> Streams | None:
    """This rank's streams; None where the checkpoint holds none, or another layout's.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            ranks = {name.split("/")[0] for name in names}
            world = groups.tp_size * groups.pp_size * groups.dp_size
            if len(ranks) != world or _place(groups) not in ranks:
                return None
            mine = [name for name in names if name.startswith(f"{_place(groups)}/")]
            return {name.split("/", 1)[1]: file.get_tensor(name) for name in mine}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _place(groups: ParallelGroups) -> str:
    return (
        f"tp{groups.tp_rank}of{groups.tp_size}-pp{groups.pp_rank}of{groups.pp_size}"
        f"-dp{groups.dp_rank}of{groups.dp_size}"
    )


def _python() -> Tensor:
    version, internal, _ = random.getstate()
    # the third part is a normal deviate that random.gauss keeps for its next call; nothing here calls it
    return torch.tensor([version, *internal], dtype=torch.int64)


def _numpy() -> Tensor:
    _, words, position, *_ = np.random.get_state()
    return torch.tensor([*(int(word) for word in words), int(position)], dtype=torch.int64)
