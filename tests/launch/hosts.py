"""Two machines on this one: each has a network, a host name, processes and mounts of its own, and no way out.

Everything hangs on processes that die with this one, however it ends: namespaces, links and mounts go with them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

PREFIX = "10.231.7"  # a private network that only the two have
_READY_S = 10.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)

# a shell as the first process: it adopts and reaps what loses its parent
_BOOT = 'set -e; hostname "$0"; mount --bind "$1" /etc/hosts; sleep infinity & while true; do wait; done'


class Machine:
    """A virtual host.

    Args:
        name: host name.
        network: process whose network it has.
        hosts_file: its ``/etc/hosts``.
    """

    def __init__(self, name: str, network: int, hosts_file: Path) -> None:
        self.name, self.network, self._hosts_file = name, network, hosts_file
        self._outside: subprocess.Popen[bytes] | None = None
        self._first = 0  # its first process, as this machine numbers it
        self.boot()

    def boot(self) -> None:
        """Start, or start again after :meth:`crash`."""
        new = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        command = ("nsenter", f"--net=/proc/{self.network}/ns/net", *new)
        self._outside = _tied([*command, "bash", "-c", _BOOT, self.name, str(self._hosts_file)])
        self._first = _wait(lambda: _only_child(self._outside), f"{self.name} did not start")
        _wait(lambda: self._says_its_name(), f"{self.name} has no host name")

    @property
    def is_up(self) -> bool:
        """Whether it runs."""
        return self._outside is not None

    def crash(self) -> None:
        """End every process at once, as a loss of power would; nothing can be caught or saved."""
        if self._outside is not None:
            self._outside.kill()
            self._outside.wait()
            self._outside = None
            _wait(lambda: _is_gone(self._first), f"{self.name} does not end")

    def command(self, *words: str, cwd: Path | None = None) -> list[str]:
        """The command line that runs ``words`` there."""
        place = [] if cwd is None else ["env", f"--chdir={cwd}"]  # entering a mount namespace leads to its root
        return ["nsenter", f"--target={self._first}", "--net", "--uts", "--mount", "--pid", *place, *words]

    def run(self, *words: str, cwd: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run there and wait; output is captured."""
        given = {"check": True, "capture_output": True, "text": True, "timeout": 60, **options}
        return subprocess.run(self.command(*words, cwd=cwd), **given)

    def start(
        self, *words: str, log: IO[bytes], env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Run there and do not wait. The returned process ends with the command; kill that with :meth:`crash`."""
        return _tied(self.command(*words, cwd=cwd), env=env, log=log)

    def _says_its_name(self) -> bool:
        said = subprocess.run(self.command("sh", "-c", "hostname; cat /etc/hosts"), capture_output=True, text=True)
        return said.stdout == f"{self.name}\n{self._hosts_file.read_text()}"


class Hosts:
    """Machines ``kton1`` and ``kton2`` on a link between them, without a route to anything else. A context manager.

    Args:
        folder: for their files; they write nowhere else.
    """

    NAMES = ("kton1", "kton2")

    def __init__(self, folder: Path) -> None:
        self._hosts_file = folder / "hosts"
        self._networks: list[subprocess.Popen[bytes]] = []
        self._machines: list[Machine] = []
        folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def address(name: str) -> str:
        """IPv4 address of a machine."""
        return f"{PREFIX}.{Hosts.NAMES.index(name) + 1}"

    def __enter__(self) -> Hosts:
        try:
            self._connect()
            for name in self.NAMES:
                self.machine(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> Machine:
        """The machine of that name."""
        return self._machines[self.NAMES.index(name)]

    def machine(self, name: str) -> Machine:
        """One more set of processes on the network of ``name``, which lives and crashes on its own."""
        made = Machine(name, self._networks[self.NAMES.index(name)].pid, self._hosts_file)
        self._machines.append(made)
        return made

    def close(self) -> None:
        """End all of it. The kernel takes networks, links and mounts away with the last process that uses them."""
        for machine in self._machines:
            machine.crash()
        for network in self._networks:
            network.kill()
            network.wait()
        self._machines, self._networks = [], []
        self._hosts_file.unlink(missing_ok=True)

    def _connect(self) -> None:
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.NAMES)]
        self._hosts_file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        own = os.readlink("/proc/self/ns/net")
        for _ in self.NAMES:
            network = _tied(["unshare", "--net", "sleep", "infinity"])
            self._networks.append(network)
            _wait(lambda pid=network.pid: os.readlink(f"/proc/{pid}/ns/net") != own, "no network namespace")
        first, second = (str(network.pid) for network in self._networks)
        # made inside the first, so that this machine's own network is never touched
        self._ip(first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
        for name, network in zip(self.NAMES, (first, second), strict=True):
            self._ip(network, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                self._ip(network, "link", "set", link, "up")

    @staticmethod
    def _ip(network: str, *words: str) -> None:
        command = ["nsenter", f"--net=/proc/{network}/ns/net", "ip", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _tied(
    command: Sequence[str],
    *,
    log: IO[bytes] | int = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process that is killed when this one ends, and does not hear the terminal's Ctrl-C."""

    def die_with_parent() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=env,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def _only_child(process: subprocess.Popen[bytes] | None) -> int:
    assert process is not None
    assert process.poll() is None, f"ended with code {process.returncode}"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0]) if children else 0


def _is_gone(pid: int) -> bool:
    """Whether it has ended; the kernel ends the others of its namespace first. Who reaps it does not matter."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def _wait(ask: Any, failure: str) -> Any:
    """What ``ask`` returns once that is true; an error if it is not in time."""
    deadline = time.monotonic() + _READY_S
    while not (answer := ask()):
        assert time.monotonic() < deadline, failure
        time.sleep(0.02)
    return answer
