"""Joining a job: the ranks meet at a store, agree that all are there, and form the default process group.

torch's own start waits for a missing rank as long as for any collective, and then reports a timeout on each rank. Here
the ranks that did come agree on who did not, and all of them say so.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from nemo_kto import interrupts, peers
from nemo_kto.config.world import LISTEN_FD, World, meeting_point
from nemo_kto.errors import ConfigError, StoppedEarlyError

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_NAME_SERVICE_S = 30.0  # a name service that cannot answer may do so a moment later
_SHOWN = 20  # missing ranks named in a message
_ALL_HERE = "all here"

_store: Store | None = None
_joined = 0


@dataclass(frozen=True)
class Timeouts:
    """How long ranks wait for each other.

    Attributes:
        join: until all ranks of the job are there.
        collective: in any exchange. Long, since one rank may write a large checkpoint while the others wait.
    """

    join: timedelta = timedelta(minutes=10)
    collective: timedelta = timedelta(minutes=30)


DEFAULT_TIMEOUTS = Timeouts()


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
    global _joined
    if dist.is_initialized():
        return
    store: Store
    if world.size == 1:
        store = HashStore()
    else:
        deadline = time.monotonic() + timeouts.join.total_seconds()
        # each joining has its own keys: a process may leave and join again
        store = PrefixStore(f"nemo_kto/{_joined}", _meeting_store(world, deadline, timeouts.join))
        _meet(store, world, deadline, timeouts.join)
    _joined += 1
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeouts.collective)
    if world.size > 1:
        peers.watch(PrefixStore("nemo_kto/failures", _another_client()), world.rank)


def _meeting_store(world: World, deadline: float, patience: timedelta) -> Store:
    """This process's connection to the one store of the job: torchrun's, else one that rank 0 serves."""
    global _store
    if _store is None:
        address, port = meeting_point()
        _check_address(address, deadline)
        serves = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if serves:
            _store = _serve(address, port)
        else:
            who = "torchrun" if world.rank == 0 else "rank 0"
            _reach(world, address, port, deadline, patience, who)
            _store = _within(lambda: _client(address, port), world, deadline, f"{address}:{port} does not answer")
    return _store


def _serve(address: str, port: int) -> Store:
    given = os.environ.pop(LISTEN_FD, None)
    try:
        return TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(minutes=1),
            master_listen_fd=None if given is None else int(given),
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise ConfigError(f"MASTER_PORT={port}: cannot listen there: {_first_line(error)}") from error
        raise ConfigError(
            f"MASTER_PORT={port} is in use on {address}, perhaps by an earlier run that still ends: "
            "set MASTER_PORT to a free port, the same for all ranks"
        ) from error


def _client(address: str, port: int) -> Store:
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=1))


def _another_client() -> Store:
    """A connection for another thread: one connection serves one request at a time."""
    return _client(*meeting_point())


def _check_address(address: str, deadline: float) -> None:
    """Raises ConfigError for a name that means nothing."""
    until = min(deadline, time.monotonic() + _NAME_SERVICE_S)
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN or time.monotonic() > until:
                raise ConfigError(
                    f"MASTER_ADDR={address} cannot be resolved ({error.strerror}): set it to the host name or address "
                    "of the node where rank 0 runs"
                ) from None
        _pause()


def _reach(world: World, address: str, port: int, deadline: float, patience: timedelta, who: str) -> None:
    """Wait until somebody listens."""
    while True:
        try:
            with socket.create_connection((address, port), timeout=2):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{who} did not listen at MASTER_ADDR={address}, MASTER_PORT={port} within {_said(patience)} "
                    f"({error.strerror or error}), said rank {world.rank} of {world.size}: its own log says why, or "
                    "address and port are not those of rank 0"
                ) from None
        _pause()


def _within(connect: Callable[[], Store], world: World, deadline: float, problem: str) -> Store:
    """``connect()``, in a thread: where another program listens, torch waits for its answer without end."""
    found: list[Store] = []
    failed: list[Exception] = []

    def work() -> None:
        try:
            found.append(connect())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    peers.may_block(thread)
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(_POLL_S)
        _heed()
    if found:
        return found[0]
    reason = f" ({_first_line(failed[0])})" if failed else ""
    raise ConfigError(
        f"{problem} as rank 0 would{reason}, said rank {world.rank} of {world.size}: another program uses "
        "MASTER_PORT; set it to a free port, the same for all ranks"
    )


def _meet(store: Store, world: World, deadline: float, patience: timedelta) -> None:
    """Wait for all ranks. The first that sees all of them, or whose patience ends, decides for everybody."""
    try:
        store.set(f"rank {world.rank}", "here")
        store.add("count", 1)
        verdict = ""
        while not verdict:
            if store.add("count", 0) >= world.size:
                verdict = _decide(store, _ALL_HERE)
            elif store.check(["verdict"]):
                verdict = _decide(store, "")
            elif time.monotonic() > deadline:
                verdict = _decide(store, _missing(store, world, patience))
            else:
                _pause()
        if verdict != _ALL_HERE:
            _let_others_read(store, world)
            raise ConfigError(verdict)
    except dist.DistError as error:
        raise peers.lost_contact(error) from error


def _decide(store: Store, verdict: str) -> str:
    """The job's verdict: this one, unless there is one."""
    return bytes(store.compare_set("verdict", "", verdict)).decode()


def _missing(store: Store, world: World, patience: timedelta) -> str:
    absent = [rank for rank in range(world.size) if not store.check([f"rank {rank}"])]
    names = ", ".join(map(str, absent[:_SHOWN])) + (f" and {len(absent) - _SHOWN} more" if absent[_SHOWN:] else "")
    return (
        f"{'rank' if len(absent) == 1 else 'ranks'} {names} of {world.size} did not join within {_said(patience)}: "
        "their own logs say why; or start as many processes as the launcher's WORLD_SIZE or SLURM_NTASKS says. "
        "trainer.join_timeout_minutes is how long the others wait"
    )


def _let_others_read(store: Store, world: World) -> None:
    """Keep the store alive until those who are there have the verdict, or should have."""
    here = sum(store.check([f"rank {rank}"]) for rank in range(world.size))
    store.add("read", 1)
    until = time.monotonic() + 25 * _POLL_S
    while world.rank == 0 and store.add("read", 0) < here and time.monotonic() < until:
        time.sleep(_POLL_S)


def _pause() -> None:
    time.sleep(_POLL_S)
    _heed()


def _heed() -> None:
    name = interrupts.requested()
    if name is not None:
        raise StoppedEarlyError(
            f"stopped by {name} before all ranks had joined; nothing has begun, the same command starts again"
        )


def _said(patience: timedelta) -> str:
    seconds = patience.total_seconds()
    return f"{seconds:g} s" if seconds < 120 else f"{seconds / 60:g} minutes"


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].strip()
