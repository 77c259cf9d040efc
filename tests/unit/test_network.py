"""Which interface gloo would take, and how a job of several machines is kept off loopback."""

from __future__ import annotations

import socket

import pytest

from nemo_kto.config import network
from nemo_kto.config.network import Interface

LO = Interface("lo", ("127.0.0.1", "::1"), 0)
ETH = Interface("eth0", ("10.9.8.7",), 1000)
IB = Interface("ib0", ("10.5.5.5",), 200000)
BRIDGE = Interface("docker0", ("172.17.0.1",), 10)


@pytest.fixture
def machine(monkeypatch):
    """Sets what the machine has, what its own name means, and where the way to others goes."""

    def set_up(here: list[Interface], own: str, towards: str | None = None) -> None:
        monkeypatch.setattr(network, "interfaces", lambda: here)
        monkeypatch.setattr(network, "_own_addresses", lambda: iter([own]))
        monkeypatch.setattr(network, "route_interface", lambda _: towards)

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    return set_up


def test_this_machine():
    found = {interface.name: interface for interface in network.interfaces()}
    assert "127.0.0.1" in found["lo"].addresses
    assert not found["lo"].leads_out
    assert network.route_interface("127.0.0.1") == "lo"
    assert network.route_interface("no.such.host.invalid") is None


def test_gloo_takes_the_interface_of_its_hosts_name(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    address = socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM)[0][4][0]
    name = network.gloo_interface()
    addresses = [a for interface in network.interfaces() if interface.name == name for a in interface.addresses]
    assert address in addresses or name == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert network.gloo_interface() == "eth7"


@pytest.mark.parametrize(
    ("here", "own", "towards", "master", "chosen"),
    [
        ([LO, ETH], "10.9.8.7", "eth0", "head", None),  # gloo does it right by itself
        ([LO, ETH, IB], "127.0.1.1", "ib0", "head", "ib0"),
        ([LO, ETH, BRIDGE], "127.0.1.1", "lo", "head", "eth0"),  # on the head itself
        ([LO, ETH, IB], "127.0.1.1", "lo", "head", None),  # two ways out: not for us to guess
        ([LO, ETH], "127.0.1.1", "lo", "127.0.0.1", None),  # all on one machine
        ([LO, ETH], "127.0.1.1", "lo", "localhost", None),
        ([LO], "127.0.1.1", "lo", "head", None),
    ],
)
def test_gloo_is_led_out(machine, monkeypatch, here, own, towards, master, chosen):
    machine(here, own, towards)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    assert network.lead_gloo_out(master) == chosen
    assert network.os.environ["GLOO_SOCKET_IFNAME"] == (chosen or "")


def test_the_users_choice_stays(machine, monkeypatch):
    machine([LO, ETH], "127.0.1.1", "eth0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert network.lead_gloo_out("head") is None
