"""Where rank 0 serves the store: an address that leads elsewhere is named before torch is asked."""

from __future__ import annotations

import errno
import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from nemo_kto.config.world import World
from nemo_kto.distributed import join, meeting
from nemo_kto.errors import ConfigError

FOREIGN = "198.51.100.77"
"""Set aside for documentation (RFC 5737): no machine's own."""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def no_torch(monkeypatch):
    """Torch's store is not asked: it would print its stack for every try."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch was asked")

    monkeypatch.setattr(meeting, "TCPStore", refuse)


def _serve(address: str, port: int, seconds: float = 0.0) -> object:
    return meeting._serve(address, port, time.monotonic() + seconds)


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_addresses_of_this_machine(address):
    assert meeting._is_own(address)


def test_addresses_of_other_machines():
    assert not meeting._is_own(FOREIGN)
    assert meeting._is_own("no.such.host.invalid"), "a name service that is out is no reason to refuse"


def test_where_the_kernel_does_not_tell_torch_is_asked(monkeypatch):
    def denied(*_: object) -> None:
        raise OSError(errno.EPERM, "sandboxed")

    monkeypatch.setattr(socket.socket, "bind", denied)
    assert meeting._is_own(FOREIGN)


@pytest.mark.usefixtures("no_torch")
def test_an_address_of_another_machine_is_named(port, monkeypatch):
    named = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (FOREIGN, 0))]
    monkeypatch.setattr(meeting.socket, "getaddrinfo", lambda *_, **__: named)
    monkeypatch.setattr(meeting, "_no_way", lambda *_: "No route to host")
    with pytest.raises(ConfigError) as told:
        _serve("node7", port)
    said = str(told.value)
    assert said.startswith(f"MASTER_ADDR=node7 ({FOREIGN}) does not lead to this machine, where rank 0 runs")
    assert "(No route to host): set it, the same for all ranks, to the host name or address of rank 0's node" in said
    assert f"This one is {socket.gethostname()}" in said
    assert "\n" not in said


@pytest.mark.usefixtures("no_torch")
def test_it_is_told_in_time_and_the_port_is_free_again(port):
    began = time.monotonic()
    with pytest.raises(ConfigError, match=f"MASTER_ADDR={FOREIGN} does not lead to this machine"):
        _serve(FOREIGN, port, 1.0)
    assert time.monotonic() - began < 10
    socket.create_server(("", port)).close()


def test_an_address_that_is_translated_to_this_machine_serves(port, monkeypatch):
    """As a container's host or a cluster's service does it: no interface here has the address."""
    monkeypatch.setattr(meeting, "_is_own", lambda _: False)
    store = _serve("127.0.0.1", port)
    store.set("key", "value")
    assert meeting._client("127.0.0.1", port).get("key") == b"value"


def test_other_ranks_that_come_first_are_not_taken_for_this_one(port):
    with meeting._listen("127.0.0.1", port) as listener:
        socket.create_connection(("127.0.0.1", port)).close()
        with socket.create_connection(("127.0.0.1", port)) as another:
            another.sendall(b"torch's greeting")
            assert meeting._no_way(listener, "127.0.0.1", port) == ""


def test_another_machine_that_answers_is_not_this_one(port):
    with meeting._listen("127.0.0.1", port) as listener, socket.create_server(("127.0.0.1", 0)) as another:
        problem = meeting._no_way(listener, "127.0.0.1", another.getsockname()[1])
    assert problem == "another machine answers there"


@pytest.mark.usefixtures("no_torch")
def test_a_taken_port_is_named_behind_a_translated_address_too(port, monkeypatch):
    monkeypatch.setattr(meeting, "_is_own", lambda _: False)
    with socket.create_server(("", port)), pytest.raises(ConfigError, match=f"^MASTER_PORT={port} is in use on"):
        _serve("127.0.0.1", port)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (
            "The client socket has failed to connect to any address of (h, 1).\nframe #0: c10",
            "MASTER_ADDR=127",
        ),
        ("The server socket has failed to listen: EADDRINUSE\nframe #0: c10", "MASTER_PORT=1 is in use"),
        ("The server socket has failed to listen: EACCES\nframe #0: c10", "MASTER_PORT=1: rank 0 cannot listen"),
    ],
)
def test_what_torch_reports_is_one_line_with_the_key_and_the_fix(reason, said, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise dist.DistNetworkError(reason)

    monkeypatch.setattr(meeting, "TCPStore", fail)
    with pytest.raises(ConfigError) as told:
        _serve("127.0.0.1", 1)
    assert str(told.value).startswith(said)
    assert "set " in str(told.value)
    assert "frame #0" not in str(told.value)


def test_nothing_is_asked_where_the_launcher_listens_already(port, monkeypatch):
    """The listener of ``nemo-kto``'s own launcher is at the port, so nothing else could listen there."""
    monkeypatch.setattr(meeting, "_is_own", lambda _: False)
    listener = socket.create_server(("127.0.0.1", port))
    monkeypatch.setenv(meeting.LISTEN_FD, str(listener.detach()))
    store = _serve("127.0.0.1", port)
    store.set("key", "value")
    assert meeting._client("127.0.0.1", port).get("key") == b"value"


@pytest.mark.parametrize("option", ["trainer.join_timeout_minutes", "--timeout"])
def test_who_waits_is_told_what_sets_the_wait(option):
    timeouts = join.Timeouts(timedelta(seconds=3), timedelta(seconds=3), option)
    said = join._missing(dist.HashStore(), World(0, 2, 2, launched=True), timeouts)
    assert said.startswith("ranks 0, 1 of 2 did not join within 3 s: ")
    assert said.endswith(f"{option} is how long the others wait")
    assert join.DEFAULT_TIMEOUTS.join_option == "trainer.join_timeout_minutes"
