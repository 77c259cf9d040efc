"""However a test run ends, the cluster and its machines leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.launch, pytest.mark.usefixtures("machine")]

MARK = "NEMO_KTO_TEARDOWN"
CODE = """
import signal, sys, time
from pathlib import Path
from slurm_cluster import Cluster
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a script has put into the background
with Cluster(Path(sys.argv[1])) as cluster:
    cluster.submit("sbatch", "--parsable", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 300")
    cluster.until(lambda: cluster.state(1) == "RUNNING", 30, "the job does not start")
    print("up", flush=True)
    if sys.argv[2] == "wait":
        time.sleep(300)
    if sys.argv[2] == "fail":
        raise ValueError("a test that fails")
"""


def _marked(mark: str) -> list[str]:
    """Processes that inherited the mark, without zombies, which have no environment."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit() and f"{MARK}={mark}".encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def _outside() -> tuple[str, list[str]]:
    """This machine's mounts and network devices."""
    return Path("/proc/self/mounts").read_text(), sorted(os.listdir("/sys/class/net"))


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="kto_"))
    yield made
    subprocess.run(["rm", "-rf", str(made)], check=True)


@pytest.mark.parametrize(
    ("way", "blow", "code"),
    [("end", None, 0), ("fail", None, 1), ("wait", signal.SIGINT, -signal.SIGINT), ("wait", signal.SIGKILL, -9)],
    ids=["end", "failure", "ctrl-c", "kill"],
)
def test_nothing_is_left(folder, way, blow, code):
    mark, before = uuid.uuid4().hex, _outside()
    env = {**os.environ, MARK: mark, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", CODE, str(folder), way]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n", process.communicate(timeout=60)
        if blow is not None:
            assert {"munged", "slurmctld", "slurmd", "sleep"} <= {line.split()[0] for line in _marked(mark)}
            process.send_signal(blow)
        process.communicate(timeout=60)
    assert process.returncode == code
    deadline = time.monotonic() + 10
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert _outside() == before
    assert folder.exists() == (blow == signal.SIGKILL)  # files alone survive that
