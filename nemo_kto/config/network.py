"""Which network interface carries what. Reads the machine and the environment; starts nothing."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"
_INNER = ("lo", "docker", "virbr", "veth", "br-", "cni", "podman")
"""How interfaces begin that lead to no other machine: loopback, and bridges to this machine's own guests."""


@dataclass(frozen=True)
class Interface:
    """One network interface that is up. ``megabits`` per second are 0 where the kernel does not say."""

    name: str
    addresses: tuple[str, ...]
    megabits: int

    @property
    def leads_out(self) -> bool:
        """Whether other machines may be behind it."""
        return not self.name.startswith(_INNER) and any(not _is_loopback(address) for address in self.addresses)


def interfaces() -> list[Interface]:
    """Those of this machine, or of its container, that are up and have an IP address."""
    import psutil  # type: ignore[import-untyped]

    stats = psutil.net_if_stats()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        ips = tuple(
            entry.address.split("%")[0] for entry in addresses if entry.family in (socket.AF_INET, socket.AF_INET6)
        )
        if ips and name in stats and stats[name].isup:
            found.append(Interface(name, ips, stats[name].speed))
    return found


def gloo_interface() -> str | None:
    """The interface of gloo's connections, as torch chooses it; None if there is none with that address.

    The variable's, else that of the first address of this host's own name that can be bound, else loopback
    (ProcessGroupGloo's ``createDefaultDevice``). It does not look where the other ranks are.
    """
    if os.environ.get(GLOO_INTERFACE):
        return os.environ[GLOO_INTERFACE]
    return _owner(next(_own_addresses(), "127.0.0.1"))


def nccl_interface() -> str | None:
    """The interface of NCCL's connections where the variable names it; None: NCCL chooses."""
    return os.environ.get(NCCL_INTERFACE) or None


def route_interface(host: str) -> str | None:
    """The interface through which this machine reaches ``host``; None if it cannot tell."""
    with suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: the kernel looks up the route
            return _owner(probe.getsockname()[0])
    return None


def lead_gloo_out(master: str) -> str | None:
    """Set gloo's interface for a job of several machines where it would take loopback; the interface that was set.

    Many systems give their own name the address 127.0.1.1, and gloo would offer that to other machines.

    Args:
        master: the address where rank 0 waits. Nothing is set for one on this machine only.
    """
    if os.environ.get(GLOO_INTERFACE) or _is_loopback(master):
        return None
    out = {interface.name for interface in interfaces() if interface.leads_out}
    if gloo_interface() in out:
        return None
    towards = route_interface(master)
    choice = towards if towards in out else next(iter(out)) if len(out) == 1 else None
    if choice is not None:
        os.environ[GLOO_INTERFACE] = choice
    return choice


def _own_addresses() -> Iterator[str]:
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                yield str(address[0])


def _owner(address: str) -> str | None:
    address = address.split("%")[0]
    names = [interface.name for interface in interfaces() if address in interface.addresses]
    return names[0] if names else "lo" if _is_loopback(address) else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"
