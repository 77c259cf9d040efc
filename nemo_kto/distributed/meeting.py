"""The store where the ranks of a job meet: torchrun's, else one that rank 0 serves. Forms no process group."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from nemo_kto import interrupts, peers
from nemo_kto.config.network import interfaces
from nemo_kto.config.world import LISTEN_FD, World, meeting_point
from nemo_kto.errors import ConfigError, StoppedEarlyError

POLL_S = 0.2
_NAME_SERVICE_S = 30.0  # a name service that cannot answer may do so a moment later
_ROUTE_S = 30.0  # so may whatever leads a virtual address here

_store: Store | None = None


def meeting_store(world: World, deadline: float, patience: timedelta) -> Store:
    """This process's connection to the one store of the job: torchrun's, else one that rank 0 serves."""
    global _store
    if _store is None:
        address, port = meeting_point()
        _check_address(address, deadline)
        if serves(world):
            _store = _serve(address, port, deadline)
        else:
            who = "torchrun" if world.rank == 0 else "rank 0"
            _reach(world, address, port, deadline, patience, who)
            _store = _within(lambda: _client(address, port), world, deadline, f"{address}:{port} does not answer")
    return _store


def serves(world: World) -> bool:
    """Whether this process is to serve the store: rank 0, where no launcher does."""
    return world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _serve(address: str, port: int, deadline: float) -> Store:
    given = os.environ.pop(LISTEN_FD, None)
    listener = None if given is None else int(given)
    if listener is None and not _is_own(address):
        listener = _listener_behind(address, port, deadline)
    try:
        return TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(minutes=1),
            master_listen_fd=listener,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise _in_use(address, port) from error
        if "client socket" in str(error):  # it listens, and then connects to itself
            raise _leads_elsewhere(address, _first_line(error)) from error
        raise _cannot_listen(port, _first_line(error)) from error


def _is_own(address: str) -> bool:
    """Whether the name means an address of this machine, or the kernel does not tell."""
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return True
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(where)
            return True
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                return True
    return False


def _listener_behind(address: str, port: int, deadline: float) -> int:
    """A socket that listens at ``port``, once a connection to ``address`` has come out there.

    An address that no interface has may lead here all the same: a container's host or a cluster's service translates
    it. torch would find out as well, in a minute, and would print its stack for every try.
    """
    until = min(deadline, time.monotonic() + _ROUTE_S)
    with _listen(address, port) as listener:
        while problem := _no_way(listener, address, port):
            if time.monotonic() > until:
                raise _leads_elsewhere(address, problem)
            pause()
        listener.setblocking(True)
        return listener.detach()


def _listen(address: str, port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=socket.SOMAXCONN, dualstack_ipv6=True
            )
        return socket.create_server(("", port), backlog=socket.SOMAXCONN)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _in_use(address, port) from None
        raise _cannot_listen(port, error.strerror or str(error)) from None


def _no_way(listener: socket.socket, address: str, port: int) -> str:
    """Why a connection to the address does not come out at the listener; empty if it does."""
    word = secrets.token_bytes(16)  # whoever answers at the address may be another machine
    try:
        with socket.create_connection((address, port), timeout=2) as probe:
            probe.sendall(word)
            return "" if _hears(listener, word) else "another machine answers there"
    except OSError as error:
        return error.strerror or str(error)


def _hears(listener: socket.socket, word: bytes) -> bool:
    """Whether somebody brings this word. Other ranks may come first; they come again."""
    until = time.monotonic() + 2
    with suppress(TimeoutError):
        while (left := until - time.monotonic()) > 0:
            listener.settimeout(left)
            guest, _ = listener.accept()
            with guest, suppress(OSError):
                guest.settimeout(0.5)
                if guest.recv(len(word)) == word:
                    return True
    return False


def _leads_elsewhere(address: str, reason: str) -> ConfigError:
    own: list[str] = []
    with suppress(Exception):  # psutil may be broken, and sandboxes refuse the question
        own = [ip for one in interfaces() if one.leads_out for ip in one.addresses if not ip.startswith("fe80:")]
    meant: set[str] = set()
    with suppress(OSError):
        meant = {str(found[4][0]) for found in socket.getaddrinfo(address, None)} - {address}
    return ConfigError(
        f"MASTER_ADDR={address}{_listed(sorted(meant))} does not lead to this machine, where rank 0 runs and must "
        f"listen ({reason}): set it, the same for all ranks, to the host name or address of rank 0's node. This one "
        f"is {socket.gethostname()}{_listed(own)}"
    )


def _listed(addresses: list[str]) -> str:
    return f" ({', '.join(addresses)})" if addresses else ""


def _in_use(address: str, port: int) -> ConfigError:
    return ConfigError(
        f"MASTER_PORT={port} is in use on {address}, perhaps by an earlier run that still ends: "
        "set MASTER_PORT to a free port, the same for all ranks"
    )


def _cannot_listen(port: int, reason: str) -> ConfigError:
    return ConfigError(
        f"MASTER_PORT={port}: rank 0 cannot listen there ({reason}): set MASTER_PORT to a free port, the same for "
        "all ranks"
    )


def _client(address: str, port: int) -> Store:
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=1))


def another_client() -> Store:
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
        pause()


def _reach(world: World, address: str, port: int, deadline: float, patience: timedelta, who: str) -> None:
    """Wait until somebody listens."""
    while True:
        try:
            with socket.create_connection((address, port), timeout=2):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{who} did not listen at MASTER_ADDR={address}, MASTER_PORT={port} within {said(patience)} "
                    f"({error.strerror or error}), said rank {world.rank} of {world.size}: its own log says why, or "
                    "address and port are not those of rank 0"
                ) from None
        pause()


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
        thread.join(POLL_S)
        _heed()
    if found:
        return found[0]
    reason = f" ({_first_line(failed[0])})" if failed else ""
    raise ConfigError(
        f"{problem} as rank 0 would{reason}, said rank {world.rank} of {world.size}: another program uses "
        "MASTER_PORT; set it to a free port, the same for all ranks"
    )


def pause() -> None:
    """A moment between two looks; raises StoppedEarlyError where a signal asks this process to stop."""
    time.sleep(POLL_S)
    _heed()


def _heed() -> None:
    name = interrupts.requested()
    if name is not None:
        raise StoppedEarlyError(
            f"stopped by {name} before all ranks had joined; nothing has begun, the same command starts again"
        )


def said(patience: timedelta) -> str:
    """A time in words."""
    seconds = patience.total_seconds()
    return f"{seconds:g} s" if seconds < 120 else f"{seconds / 60:g} minutes"


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].strip()
