"""`nemo-kto doctor` as a user starts it: on a sound machine, on broken ones, and on several ranks."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_runs import TORCHRUN

pytestmark = pytest.mark.integration

DOCTOR = (sys.executable, "-m", "nemo_kto.cli.main", "doctor")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PROBES = ["launcher", "packages", "devices", "acceleration", "network", "limits", "output"]
EVERY = {"schema": int, "nemo_kto": str, "ok": bool, "exit_code": int, "probes": dict, "problems": list}
SAID = {"probe": str, "what": str, "why": str, "fix": str, "blocks": bool}


def _doctor(
    here: Path, *words: str, command: tuple[str, ...] = DOCTOR, **options: object
) -> subprocess.CompletedProcess:
    given = dict(options.pop("environment", {}))  # type: ignore[call-overload]
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    env |= {"OMP_NUM_THREADS": "1", **given}
    options.setdefault("cwd", here)
    return subprocess.run(
        [*command, *words], env=env, capture_output=True, text=True, timeout=500, check=False, **options
    )


def _report(done: subprocess.CompletedProcess) -> dict:
    """The JSON, which must be all of standard output and of the promised shape."""
    report = json.loads(done.stdout)
    assert {key: type(value) for key, value in report.items()} == EVERY
    for problem in report["problems"]:
        assert {key: type(value) for key, value in problem.items()} == SAID
        assert problem["probe"] in report["probes"]
    assert report["exit_code"] == done.returncode == (0 if report["ok"] else 2)
    assert "Traceback" not in done.stderr
    return report


def _problems(report: dict, probe: str) -> str:
    return "\n".join(problem["what"] for problem in report["problems"] if problem["probe"] == probe)


def test_a_sound_machine_and_two_processes_on_it(tmp_path):
    report = _report(_doctor(tmp_path, "--json", "--collective"))
    assert list(report["probes"]) == [*PROBES, "collective"]
    assert report["ok"], report["problems"]
    probes = report["probes"]
    for name in ("torch", "Megatron-Core", "Lightning", "transformers", "NeMo"):
        assert probes["packages"][name]["imports"], name
        assert probes["packages"][name]["version"], name
    assert probes["devices"]["torch"]["version"] == probes["packages"]["torch"]["version"]
    assert probes["acceleration"]["megatron"]["optimizer"].split(".")[0] in ("torch", "apex", "transformer_engine")
    assert probes["output"]["writable"]
    assert probes["output"]["locks"]
    exchange = probes["collective"]
    assert (exchange["ranks"], exchange["ok"], exchange["errors"]) == (2, True, {})
    assert [one["measured"] for one in exchange["measured"]] == ["all_reduce", "broadcast", "send_recv"]
    assert all(one["bytes_per_second"] > 0 and one["latency_s"] > 0 for one in exchange["measured"])
    assert list(tmp_path.iterdir()) == [], "something was left behind"


def test_a_machine_with_everything_broken_is_a_report(tmp_path):
    """Packages that raise, exit or crash when imported; no room for output, few files, a contradictory launcher."""
    packages = {
        "transformers": "raise RuntimeError('built for another torch')",
        "sentencepiece": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "einops": "raise SystemExit(5)",
        "transformer_engine": "raise ImportError('undefined symbol: _ZN3c10')",
        "apex": "",
    }
    for name, code in packages.items():
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(code)
    (tmp_path / "file").touch()
    done = _doctor(
        tmp_path,
        *("--json", "--output", "file/run"),
        environment={"PYTHONPATH": f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}", "WORLD_SIZE": "3"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)),
    )
    report = _report(done)
    assert done.returncode == 2
    said = _problems(report, "packages")
    assert "transformers cannot be imported (RuntimeError: built for another torch)" in said
    assert "sentencepiece cannot be imported (its process was ended by SIGSEGV)" in said
    assert "einops cannot be imported (SystemExit: 5)" in said
    assert "Transformer Engine cannot be imported (ImportError: undefined symbol: _ZN3c10)" in said
    assert report["probes"]["packages"]["torch"]["imports"], "one broken package is not another's"
    assert "WORLD_SIZE=3 in the environment, but no RANK" in _problems(report, "launcher")
    assert "a process may hold 200 files open" in _problems(report, "limits")
    assert "exp_manager.explicit_log_dir=file/run" in _problems(report, "output")
    blocking = {problem["probe"] for problem in report["problems"] if problem["blocks"]}
    assert {"packages", "launcher", "limits", "output"} <= blocking


def test_a_broken_launcher_is_no_fault_of_a_package(tmp_path):
    """NeMo reads WORLD_SIZE when it is imported: nobody is to reinstall it for that."""
    launcher = {"WORLD_SIZE": "abc", "RANK": "0", "LOCAL_RANK": "x", "SLURM_NTASKS": "y", "SLURM_JOB_ID": "z"}
    report = _report(_doctor(tmp_path, "--json", environment=launcher))
    assert [problem["probe"] for problem in report["problems"] if problem["blocks"]] == ["launcher"]
    assert "WORLD_SIZE='abc' in the environment is no number" in _problems(report, "launcher")
    assert report["probes"]["packages"]["NeMo"]["imports"]


@pytest.mark.slow
def test_a_broken_torch_is_a_report(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object')")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    done = _doctor(tmp_path, "--collective", environment={"PYTHONPATH": path})
    assert done.returncode == 2
    assert "PROBLEM: torch cannot be imported (ImportError: libcudart.so.12: cannot open shared object)" in done.stdout
    assert "PROBLEM: rank 0 failed while importing torch: " in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_directory_that_its_user_cannot_write_to(tmp_path):
    """As in a container that runs as nobody: the default place is no reason to fail, a named one is."""
    command = DOCTOR
    if os.geteuid() == 0:  # root without its privileges: permissions count for it too
        if shutil.which("setpriv") is None:
            pytest.skip("no setpriv")
        command = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", *DOCTOR)
    tmp_path.chmod(0o555)
    report = _report(_doctor(tmp_path, "--json", command=command))
    assert report["ok"], report["problems"]
    assert "kto_results cannot be written (Permission denied)" in _problems(report, "output")
    report = _report(_doctor(tmp_path, "--json", "--output", str(tmp_path), command=command))
    assert not report["ok"]
    assert [problem["probe"] for problem in report["problems"] if problem["blocks"]] == ["output"]


@pytest.mark.slow
def test_all_ranks_of_a_job(tmp_path):
    """Rank 0 speaks, and nobody else."""
    done = _doctor(tmp_path, "--json", "--collective", command=(*TORCHRUN, "-m", "nemo_kto.cli.main", "doctor"))
    report = _report(done)
    exchange = report["probes"]["collective"]
    assert (exchange["ranks"], exchange["ok"]) == (2, True)
    assert [one["rank"] for one in exchange["reports"]] == [0, 1]
    assert report["probes"]["launcher"]["world"]["launcher"] == "torchrun"


@pytest.mark.slow
def test_a_launcher_of_one_process_is_none_for_the_two_of_the_exchange(tmp_path):
    """torchrun says that it serves the store, but knows nothing of these two."""
    command = (*TORCHRUN[:-1], "1", "-m", "nemo_kto.cli.main", "doctor")
    report = _report(_doctor(tmp_path, "--json", "--collective", command=command))
    exchange = report["probes"]["collective"]
    assert (exchange["ranks"], exchange["ok"], exchange["errors"]) == (2, True, {})


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_reported_in_time(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    report = _report(_doctor(tmp_path, "--json", "--collective", "--timeout", "3", environment=alone))
    said = _problems(report, "collective")
    assert "rank 0 failed while joining: ConfigError: rank 1 of 2 did not join within 3 s" in said
    assert "--timeout is how long" in said
    assert "trainer." not in said, "the doctor has no such option"


HANGS = """\
import sys, time
from datetime import timedelta
from nemo_kto.config.world import world_from_environment
from nemo_kto.distributed.join import Timeouts, join
join(world_from_environment(), "gloo", Timeouts(timedelta(minutes=5), timedelta(minutes=5)))
time.sleep(600)
"""


@pytest.mark.slow
def test_a_rank_that_hangs_is_reported_in_time(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    env = {**os.environ, **job, "RANK": "1", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", HANGS], env=env, cwd=tmp_path) as other:
        try:
            words = ("--json", "--collective", "--timeout", "40")
            report = _report(_doctor(tmp_path, *words, environment={**job, "RANK": "0", "LOCAL_RANK": "0"}))
        finally:
            other.kill()
    problem = next(problem for problem in report["problems"] if problem["probe"] == "collective")
    assert problem["what"].startswith("rank 0 failed while forming a gloo group: ")
    assert "GLOO_SOCKET_IFNAME" in problem["fix"]


def test_help_is_quick(tmp_path):
    began = time.monotonic()
    done = _doctor(tmp_path, "--help", preexec_fn=lambda: os.nice(-os.nice(0)) if os.geteuid() == 0 else None)
    assert done.returncode == 0
    assert "--collective" in done.stdout
    code = "import sys\nfrom nemo_kto.cli import doctor\nprint(*{'torch', 'nemo', 'megatron'} & set(sys.modules))"
    heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert heavy.stdout.strip() == ""
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_timeout_must_be_a_time(tmp_path, value):
    done = _doctor(tmp_path, "--timeout", value)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --timeout ")
