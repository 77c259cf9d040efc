"""Signals are noted and nothing else: each case in a process of its own, since handlers belong to all of it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import os, signal, sys, threading, time
from nemo_kto import interrupts
def send(number): os.kill(os.getpid(), number)
"""

CASES = {
    "none": ("interrupts.listen(); print(interrupts.requested())", "None"),
    "term": ("interrupts.listen(); send(signal.SIGTERM); print(interrupts.requested())", "SIGTERM"),
    "usr1": ("interrupts.listen(); send(signal.SIGUSR1); print(interrupts.requested())", "SIGUSR1"),
    "the first counts": (
        "interrupts.listen(); [send(n) for n in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)]\n"
        "print(interrupts.requested())",
        "SIGUSR1",
    ),
    "listening again": (
        "interrupts.listen(); send(signal.SIGTERM); signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        "interrupts.listen(); send(signal.SIGTERM); print(interrupts.requested())",
        "SIGTERM",
    ),
    "Ctrl-C, passed on by a launcher as well": (
        "interrupts.listen(); send(signal.SIGINT); send(signal.SIGINT); print(interrupts.requested())",
        "SIGINT",
    ),
    "Ctrl-C once more": (
        "interrupts.listen(); send(signal.SIGINT); time.sleep(1.2)\n"
        "try:\n    send(signal.SIGINT)\nexcept KeyboardInterrupt:\n    print('raised', interrupts.requested())",
        "raised SIGINT",
    ),
    "anew": (
        "interrupts.listen(); send(signal.SIGTERM); interrupts.forget(); print(interrupts.requested())",
        "None",
    ),
    "what is started shielded has them blocked": (
        "from multiprocessing import forkserver\n"
        "interrupts.listen()\nwith interrupts.shielded():\n    forkserver.ensure_running()\n"
        "status = open(f'/proc/{forkserver._forkserver._forkserver_pid}/status').read()\n"
        "mask = int(status.split('SigBlk:')[1].split()[0], 16)\n"
        "own = signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        "print([bool(mask >> (n - 1) & 1) for n in interrupts.HEEDED], own)",
        "[True, True, True] set()",
    ),
    "another thread cannot listen": (
        "t = threading.Thread(target=interrupts.listen); t.start(); t.join()\n"
        "print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)",
        "True",
    ),
    "a fork finishes what it does": (
        "interrupts.listen()\nchild = os.fork()\n"
        "if child == 0:\n    [send(n) for n in interrupts.HEEDED]; time.sleep(0.1); os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), interrupts.requested())",
        "7 None",
    ),
    "shielded, then listening": (
        "signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.HEEDED); send(signal.SIGTERM)\n"
        "print(interrupts.requested(), end=' '); interrupts.listen(); print(interrupts.requested())",
        "None SIGTERM",
    ),
    "a process started shielded": (
        "import subprocess\n"
        "with interrupts.shielded():\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(0.5); print(7)'])\n"
        "child.terminate(); sys.stdout.flush(); print(child.wait())",
        "7\n0",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_signals_are_noted(name):
    code, said = CASES[name]
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == (said, "")


LATE = """
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), numbers=(signal.SIGTERM, signal.SIGUSR1)):
        for number in numbers:
            kill(pid, number)
interrupts.listen()
kept = Late()  # goes when the interpreter has put the default actions back
sys.exit(4)
"""


def test_a_signal_in_the_last_moment_does_not_change_the_exit_code():
    done = subprocess.run([sys.executable, "-c", PRELUDE + LATE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (4, "")


def test_no_heavy_import():
    code = "import sys, nemo_kto.interrupts, nemo_kto.peers, nemo_kto.parents; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n"


# --- what a dead parent leaves

CHILD = """
import os, sys, time
from nemo_kto.parents import follow_parent
follow_parent()
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_rank_ends_with_its_launcher():
    """The launcher starts it and is killed. It gets SIGTERM, which it does not handle here."""
    launcher = textwrap.dedent(
        f"""
        import os, subprocess, sys, time
        environment = {{**os.environ, "NEMO_KTO_STARTED_BY": str(os.getpid())}}
        subprocess.Popen([sys.executable, "-c", {CHILD!r}], env=environment, start_new_session=True)
        time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True) as process:
        int(process.stdout.readline())
        process.kill()
        # reading ends when the last process that holds the pipe has gone: within a second, not after a minute
        assert process.communicate(timeout=20)[0] == ""


def test_a_process_of_multiprocessing_ends_with_its_creator(tmp_path):
    """Also one that handles no message of its parent, such as a manager's, and that SIGTERM does not reach."""
    script = tmp_path / "creates.py"
    script.write_text(
        "import multiprocessing, signal, sys, time\n"
        "from nemo_kto.cli import main\n"
        "from nemo_kto import interrupts\n"
        "if __name__ == '__main__':\n"
        "    with interrupts.shielded():\n"
        "        manager = multiprocessing.get_context('spawn').Manager()\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, script], text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.communicate(timeout=20)[0] == ""
