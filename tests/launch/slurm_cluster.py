"""A Slurm cluster of the two machines: munged, slurmctld, two slurmd with two GPUs each that exist in name only."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hosts import Hosts

GPUS = 2  # per node
GRACE_S = 90  # a preempted job's time to save: on few cores the ranks may still be importing packages
_UP_S = 30.0
_POLL_S = 0.25
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")

# cred_expire: a requeued job waits that long, 120 s by default. SlurmdTimeout is short in order to see a node's loss.
_CONF = """\
ClusterName=kto
SlurmctldHost=kton1({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,requeue_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={kill_wait}
SlurmdTimeout={slurmd_timeout}
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=kton[1-2] Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent Nodes=kton[1-2] State=UP PriorityTier=10 PreemptMode=OFF
"""
_NODE = "NodeName={name} NodeAddr={address} CPUs=2 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN\n"


class Cluster:
    """The cluster; a context manager.

    Args:
        folder: for all its files, and made for it: it is removed. Short, since a socket's path is limited to 107
            bytes.
        kill_wait: seconds between SIGTERM and SIGKILL where Slurm itself ends a job.
        slurmd_timeout: seconds after which a silent node counts as lost.

    Its srun takes the options of pyxis, as far as ``containers.c`` has them.
    """

    def __init__(self, folder: Path, *, kill_wait: int = 60, slurmd_timeout: int = 20) -> None:
        self.folder, self.hosts = folder, Hosts(folder)
        self._conf = folder / "slurm.conf"
        self._settings = {"kill_wait": kill_wait, "slurmd_timeout": slurmd_timeout}

    def __enter__(self) -> Cluster:
        try:
            self.hosts.__enter__()
            self._write_files()
            # the controller shares kton1's network, not its fate
            self._head = self.hosts.machine("kton1")
            self._start_daemons()
            self.until(lambda: self.idle_nodes() == 2, _UP_S, "the cluster did not come up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all daemons and jobs, and remove their files."""
        self.hosts.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def submit(self, *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> int:
        """``sbatch``, or a script that calls it; the last number it prints."""
        shown = self.client(*words, env=env, cwd=cwd)
        return int(re.findall(r"\d+", shown)[-1])

    def client(self, *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """Run one of Slurm's commands on the first node; what it prints."""
        known = {**os.environ, **(env or {}), "SLURM_CONF": str(self._conf)}
        done = self._head.run(*words, env=known, cwd=cwd, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return str(done.stdout)

    def job(self, number: int) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        text = self.client("scontrol", "--oneliner", "show", "job", str(number))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def state(self, number: int) -> str:
        """Such as RUNNING."""
        return self.job(number)["JobState"]

    def set_limit(self, number: int, minutes: int) -> None:
        """Change a job's time limit; a job that is just being requeued takes it a moment later."""
        words = ("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")

        def changed() -> bool:
            return self._head.run(*words, env=self._env, check=False).returncode == 0

        self.until(changed, _UP_S, f"the limit of job {number} cannot be changed")

    def wait(self, number: int, timeout: float) -> dict[str, str]:
        """Poll until a job has ended for good; what is known of it then. ``sbatch --wait`` looks only now and then."""
        self.until(lambda: self.state(number) in _ENDED, timeout, f"job {number} does not end")
        return self.job(number)

    def until(self, ask: Callable[[], object], timeout: float, failure: str) -> None:
        """Wait for something; an error with the daemons' last words if it does not come."""
        deadline = time.monotonic() + timeout
        while not ask():
            assert time.monotonic() < deadline, f"{failure}\n{self.client('squeue')}\n{self.last_words()}"
            time.sleep(_POLL_S)

    def idle_nodes(self) -> int:
        """Nodes that wait for work."""
        shown = self._head.run(
            "sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N", env=self._env, check=False
        )
        return len(set(shown.stdout.split()))

    def boot(self, name: str) -> None:
        """Start a machine that has crashed, and its slurmd."""
        self.hosts[name].boot()
        self._slurmd(name)

    def configure(self, **settings: int) -> None:
        """Change ``kill_wait`` or ``slurmd_timeout`` of the running cluster."""
        self._settings |= settings
        self._write_conf()
        self.client("scontrol", "reconfigure")

    def last_words(self) -> str:
        """The end of every daemon's log."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    @property
    def _env(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self._conf)}

    def _write_conf(self) -> None:
        nodes = "".join(_NODE.format(name=name, address=Hosts.address(name), gpus=GPUS) for name in Hosts.NAMES)
        conf = _CONF.format(
            head=Hosts.address("kton1"), folder=self.folder, nodes=nodes.strip(), grace=GRACE_S, **self._settings
        )
        self._conf.write_text(conf, encoding="utf-8")

    def _write_files(self) -> None:
        self._write_conf()
        plugin = self.folder / "containers.so"
        source = Path(__file__).with_name("containers.c")
        command = ["gcc", "-shared", "-fPIC", "-o", str(plugin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{done.stderr}\n(gcc, libc6-dev and libslurm-dev are in packages.txt)"
        (self.folder / "plugstack.conf").write_text(f"required {plugin}\n", encoding="utf-8")
        gres = f"NodeName=kton[1-2] Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gres, encoding="utf-8")
        for number in range(GPUS):  # as /dev/null; Slurm counts files
            os.mknod(self.folder / f"gpu{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        for name in ("ctld", *Hosts.NAMES):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        self.folder.chmod(0o755)

    def _start_daemons(self) -> None:
        files = {name: str(self.folder / f"munge.{name}") for name in ("key", "socket", "pid", "seed")}
        self._daemon(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={files['key']}", f"--socket={files['socket']}"),
            *(f"--pid-file={files['pid']}", f"--log-file={self.folder}/munge.log", f"--seed-file={files['seed']}"),
        )
        self.until(Path(files["socket"]).exists, _UP_S, "munged does not start")
        self._daemon("slurmctld", "slurmctld", "-D", "-i")
        for name in Hosts.NAMES:
            self._slurmd(name)

    def _daemon(self, title: str, *words: str) -> None:
        with (self.folder / f"{title}.log").open("ab") as log:
            self._head.start(*words, log=log, env=self._env)

    def _slurmd(self, name: str) -> None:
        with (self.folder / f"slurmd-{name}.log").open("ab") as log:
            self.hosts[name].start("slurmd", "-D", log=log, env=self._env)
