"""Joining a job: the ranks meet at a store, agree that all are there, and form the default process group.

torch's own start waits for a missing rank as long as for any collective, and then reports a timeout on each rank. Here
the ranks that did come agree on who did not, and all of them say so.
"""

from __future__ import annotations

import logging
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]

from nemo_kto import peers
from nemo_kto.config.network import gloo_interface, lead_gloo_out, nccl_interface
from nemo_kto.config.world import World, meeting_point
from nemo_kto.distributed.meeting import POLL_S, another_client, meeting_store, pause, said, serves
from nemo_kto.errors import ConfigError, KTOError

logger = logging.getLogger(__name__)

_SHOWN = 20  # missing ranks named in a message
_ALL_HERE = "all here"
_EARLY = "nemo_kto/early"  # where ranks that fail before they join say so

_entered = False
_joined = 0
_seats: list[Seat] = []


@dataclass(frozen=True)
class Seat:
    """Where a rank runs: its host's name, and the interface of its connections where that is settled."""

    host: str
    interface: str


@dataclass(frozen=True)
class Timeouts:
    """How long ranks wait for each other.

    Attributes:
        join: until all ranks of the job are there.
        collective: in any exchange. Long, since one rank may write a large checkpoint while the others wait.
        join_option: what the user sets ``join`` with, for messages.
    """

    join: timedelta = timedelta(minutes=10)
    collective: timedelta = timedelta(minutes=30)
    join_option: str = "trainer.join_timeout_minutes"


DEFAULT_TIMEOUTS = Timeouts()


def seats() -> list[Seat]:
    """Where each rank of the job runs, in the order of ranks. Rank 0 knows, once it has joined; others do not."""
    return list(_seats)


def join(world: World, backend: str, timeouts: Timeouts) -> None:
    """Form the default process group of all ranks; nothing if there is one. Alone, without any network.

    Args:
        world: this process among all of the job.
        backend: ``gloo`` or ``nccl``.
        timeouts: how long to wait for them.

    Raises:
        ConfigError: on every rank that is there: some rank is not, within ``timeouts.join``; or the meeting point
            cannot be used. It is of this kind, with exit code 2, because the launcher's settings promised another
            number of processes, or another address, than there is: starting the same again would not help.
        StoppedEarlyError: a signal asked this process to stop while it waited.
    """
    global _entered, _joined
    _entered = True
    if dist.is_initialized():
        return
    store: Store
    if world.num_nodes > 1 and (chosen := lead_gloo_out(meeting_point()[0])) is not None:
        logger.info("gloo would use loopback, as this host's name means: GLOO_SOCKET_IFNAME=%s is set", chosen)
    seat = Seat(socket.gethostname(), (gloo_interface() if backend == "gloo" else nccl_interface()) or "")
    if world.size == 1:
        store = HashStore()
        _seats[:] = [Seat(seat.host, "")]
    else:
        deadline = time.monotonic() + timeouts.join.total_seconds()
        # each joining has its own keys: a process may leave and join again
        base = meeting_store(world, deadline, timeouts.join)
        store = PrefixStore(f"nemo_kto/{_joined}", base)
        _meet(store, PrefixStore(_EARLY, base), world, seat, deadline, timeouts)
    _joined += 1
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeouts.collective)
    if world.size > 1:
        peers.watch(PrefixStore("nemo_kto/failures", another_client()), world.rank)


def _meet(store: Store, early: Store, world: World, seat: Seat, deadline: float, timeouts: Timeouts) -> None:
    """Wait for all ranks. The first that sees all of them, or whose patience ends, decides for everybody."""
    try:
        store.set(f"rank {world.rank}", f"{seat.host}\n{seat.interface}")
        _check_fresh(store.add("count", 1), world)
        verdict = ""
        while not verdict:
            if store.add("count", 0) >= world.size:
                verdict = _decide(store, _ALL_HERE)
            elif store.check(["verdict"]):
                verdict = _decide(store, "")
            elif early.check(["failed"]):
                early.add("told", 1)
                _let_others_read(store, world)
                raise peers.failed_elsewhere(early.get("failed").decode())
            elif time.monotonic() > deadline:
                verdict = _decide(store, _missing(store, world, timeouts))
            else:
                pause()
        if verdict != _ALL_HERE:
            _let_others_read(store, world)
            raise ConfigError(verdict)
        if world.rank == 0:
            answers = store.multi_get([f"rank {rank}" for rank in range(world.size)])
            _seats[:] = [Seat(*value.decode().split("\n")) for value in answers]
    except dist.DistError as error:
        raise peers.lost_contact(error) from error


def _check_fresh(here: int, world: World) -> None:
    if here > world.size:
        raise ConfigError(
            f"{here} ranks have come to meet in a world of {world.size}: torchrun has started the job again and kept "
            "the store of the attempt before. Restarts need --rdzv-backend=c10d and, on every node, "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment"
        )


def tell_waiting(world: World, message: str, patience: timedelta) -> None:
    """Tell ranks that wait in :func:`join` that this one has failed before it came there.

    Where no launcher serves the store, rank 0 does, until all others have looked; others wait until rank 0 serves.
    In a job of several nodes every such rank stays until then: the agent that it belongs to may hold the store, and
    ends with it. Gives up silently: the launcher, or the others' own patience, is then what ends them.

    Args:
        world: this process among all of the job.
        message: what this rank has to say.
        patience: how long to try.
    """
    if _entered:
        return
    deadline = time.monotonic() + patience.total_seconds()
    with suppress(KTOError, OSError, RuntimeError):
        early = PrefixStore(_EARLY, meeting_store(world, deadline, patience))
        early.compare_set("failed", "", f"rank {world.rank} failed: {message}")
        told = early.add("told", 1)
        while (serves(world) or world.num_nodes > 1) and told < world.size and time.monotonic() < deadline:
            pause()
            told = early.add("told", 0)


def _decide(store: Store, verdict: str) -> str:
    """The job's verdict: this one, unless there is one."""
    return bytes(store.compare_set("verdict", "", verdict)).decode()


def _missing(store: Store, world: World, timeouts: Timeouts) -> str:
    absent = [rank for rank in range(world.size) if not store.check([f"rank {rank}"])]
    names = ", ".join(map(str, absent[:_SHOWN])) + (f" and {len(absent) - _SHOWN} more" if absent[_SHOWN:] else "")
    return (
        f"{'rank' if len(absent) == 1 else 'ranks'} {names} of {world.size} did not join within "
        f"{said(timeouts.join)}: their own logs say why; or start as many processes as the launcher's WORLD_SIZE or "
        "SLURM_NTASKS says. "
        f"{timeouts.join_option} is how long the others wait"
    )


def _let_others_read(store: Store, world: World) -> None:
    """Keep the store alive until those who are there have the verdict, or should have."""
    here = sum(store.check([f"rank {rank}"]) for rank in range(world.size))
    store.add("read", 1)
    until = time.monotonic() + 25 * POLL_S
    while world.rank == 0 and store.add("read", 0) < here and time.monotonic() < until:
        time.sleep(POLL_S)
