"""What the doctor makes of a job: its launcher, its network, and what its ranks report."""

from __future__ import annotations

import json
import logging

import pytest

from nemo_kto.config.world import World
from nemo_kto.doctor import collective, collective_rank, launching
from nemo_kto.doctor.children import Child
from nemo_kto.doctor.findings import Finding


def _said(finding: Finding) -> str:
    return "\n".join(f"{'BLOCKS ' * problem.blocks}{problem.what} | {problem.fix}" for problem in finding.problems)


# --- launcher and network


def test_the_launchers_environment_holds_no_secrets(monkeypatch):
    monkeypatch.setenv("SLURM_JWT", "secret")
    monkeypatch.setenv("NCCL_API_TOKEN", "secret")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    finding = launching.probe()
    assert finding.facts["environment"]["NCCL_DEBUG"] == "WARN"
    assert "secret" not in json.dumps(finding.facts) + "".join(finding.lines)


def test_a_contradictory_launcher_blocks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert _said(launching.probe()).startswith("BLOCKS the launcher's environment is refused: WORLD_SIZE=4")


def test_an_interface_that_is_not_there(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuch0")
    assert "BLOCKS NCCL_SOCKET_IFNAME=nosuch0, and there is no such interface: " in _said(launching.interfaces())
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")
    assert "NCCL_SOCKET_IFNAME" not in _said(launching.interfaces())


def test_restarts_that_would_fail(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in _said(launching.probe())


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("NONE", "SLURM_EXPORT_ENV=NONE: srun passes on no variables but Slurm's own"),
        ("PATH,HOME", "SLURM_EXPORT_ENV=PATH,HOME: srun passes on only these variables, and Slurm's own"),
        ("HF_TOKEN=secret,B", "SLURM_EXPORT_ENV=HF_TOKEN=...,B: srun passes on only these variables, and Slurm's own"),
        ("ALL", ""),
        ("all", ""),
        ("HF_HOME=x,ALL", ""),
        ("", ""),
    ],
)
def test_variables_that_srun_does_not_pass_on(monkeypatch, value, what):
    monkeypatch.setenv("SLURM_EXPORT_ENV", value)
    finding = launching.probe()
    assert any(line.startswith("SLURM_EXPORT_ENV=") for line in finding.lines)
    assert [problem.what for problem in finding.problems if "EXPORT" in problem.what] == ([what] if what else [])
    assert not any(problem.blocks for problem in finding.problems)
    if what:
        assert "export SLURM_EXPORT_ENV=ALL in the batch script, before srun" in _said(finding)


def test_variables_that_srun_does_not_pass_on_are_told_of_a_contradictory_launcher_too(monkeypatch):
    monkeypatch.setenv("SLURM_EXPORT_ENV", "NONE")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert "SLURM_EXPORT_ENV=NONE: " in _said(launching.probe())


@pytest.mark.parametrize("value", ["A=secret,ALL", "ALL,A='x,secret'", 'ALL,A="secret,secret"', "ALL,A='x,secret"])
def test_values_that_a_job_is_submitted_with_are_not_shown(monkeypatch, value):
    monkeypatch.setenv("SLURM_EXPORT_ENV", value)
    finding = launching.probe()
    assert finding.facts["environment"]["SLURM_EXPORT_ENV"] in ("A=...,ALL", "ALL,A=...")
    assert "secret" not in json.dumps(finding.facts) + "".join(finding.lines) + _said(finding)


# --- what other processes are told


@pytest.mark.parametrize("as_rank", [False, True])
def test_only_a_rank_of_the_job_knows_of_its_launcher(tmp_path, monkeypatch, as_rank):
    """Packages that read its variables when they are imported would be blamed for what is wrong with them."""
    (tmp_path / "tells.py").write_text("import json, os\nprint(json.dumps(dict(os.environ)))\n")
    launcher = (
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "SLURM_PROCID", "SLURM_NTASKS"),
    )
    kept = {"CUDA_VISIBLE_DEVICES": "0", "NCCL_DEBUG": "WARN", "PYTHONPATH": str(tmp_path)}
    for name, value in {**dict.fromkeys(launcher, "abc"), **kept}.items():
        monkeypatch.setenv(name, value)
    with Child("tells", environment={"RANK": "7"}, as_rank=as_rank) as child:
        told = child.answer(30.0)
    assert told is not None
    assert kept.items() <= told.items()
    assert told["RANK"] == "7", "what is set for it wins"
    assert [name for name in launcher if told.get(name) == "abc"] == (list(launcher[1:]) if as_rank else [])


def test_the_ranks_of_a_job_know_of_its_launcher(monkeypatch):
    seen = []

    class Stops(Exception):  # noqa: N818
        pass

    def start(*_: object, **options: object) -> None:
        seen.append(options.get("as_rank", False))
        raise Stops

    monkeypatch.setattr(collective, "Child", start)
    for size in (2, 1):  # alone, there are two processes that no launcher has started
        with pytest.raises(Stops):
            collective.probe(World(0, size, size, launched=size > 1), 0, 1.0, {})
    assert seen == [True, False]


# --- collectives


def _reports(*versions: str) -> list[dict[str, object]]:
    return [
        {"rank": rank, "host": f"n{rank}", "versions": {"torch": version}, "problems": []}
        for rank, version in enumerate(versions)
    ]


def test_hosts_that_differ_are_named():
    finding = Finding("collective", "")
    collective._judge_reports(finding, _reports("2.9", "2.9", "2.8"))
    assert "BLOCKS torch differs between hosts: 2.9 on n0, n1; 2.8 on n2" in _said(finding)
    same = Finding("collective", "")
    collective._judge_reports(same, _reports("2.9", "2.9"))
    assert same.problems == []


def test_problems_of_other_hosts_are_told():
    reports = _reports("2.9", "2.9")
    reports[1]["problems"] = [{"what": "small /dev/shm", "why": "w", "fix": "f", "blocks": False}]
    finding = Finding("collective", "")
    collective._judge_reports(finding, reports)
    assert _said(finding) == "on n1: small /dev/shm | f"


@pytest.mark.parametrize(
    ("stage", "backend", "fix"),
    [
        ("joining", "gloo", "MASTER_ADDR"),
        ("forming a gloo group", "nccl", "GLOO_SOCKET_IFNAME"),
        ("all_reduce", "nccl", "NCCL_DEBUG=INFO"),
        ("importing torch", "nccl", "see packages"),
    ],
)
def test_where_it_failed_says_what_to_mend(stage, backend, fix):
    ok = {"stage": "leaving", "measured": [], "reports": [], "error": None, "done": True}
    lost = {**ok, "done": False, "stage": "all_reduce", "error": "RuntimeError: lost contact with another rank"}
    culprit = {**ok, "done": False, "stage": stage, "error": "its process was ended by SIGABRT"}
    finding = Finding("collective", "")
    collective._judge_errors(finding, {0: lost, 1: culprit, 2: ok}, backend)
    assert len(finding.problems) == 1
    assert finding.problems[0].what.startswith("rank 1 failed while ")
    assert fix in finding.problems[0].fix


def test_the_doctors_ranks_name_its_own_option(monkeypatch):
    found = []
    monkeypatch.setattr("nemo_kto.quiet.quiet", lambda: None)
    monkeypatch.setattr("nemo_kto.distributed.join.join", lambda _world, _backend, timeouts: found.append(timeouts))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1 / 0)  # far enough
    with pytest.raises(ZeroDivisionError):
        collective_rank._Test(lambda **_: None, "gloo", 3.0, {}).run()
    assert [(waits.join.total_seconds(), waits.join_option) for waits in found] == [(3.0, "--timeout")]


def test_wrong_numbers_block():
    measured = {"measured": "all_reduce", "latency_s": 1e-5, "seconds": 0.1, "bytes": 2**24, "bytes_per_second": 1e8}
    outcome = {"stage": "leaving", "reports": [], "error": None, "done": True}
    finding = Finding("collective", "")
    collective._judge(
        finding, {0: {**outcome, "measured": [{**measured, "wrong": True}]}}, "nccl", 8, World(0, 8, 8, True)
    )
    assert "BLOCKS all_reduce gave wrong numbers over nccl" in _said(finding)
    assert "all_reduce: 10 us for 4 bytes, 100.0 ms for 16 MiB (0.10 GB/s)" in finding.lines


@pytest.fixture
def logging_as_it_was():
    """``main`` sets up its process's logging, here that of a rank which keeps quiet."""
    ours = logging.getLogger("nemo_kto")
    handlers, propagate, level = ours.handlers, ours.propagate, ours.level
    yield
    ours.handlers, ours.propagate = handlers, propagate
    ours.setLevel(level)


@pytest.mark.usefixtures("logging_as_it_was")
def test_a_rank_that_nothing_started_says_who_speaks(monkeypatch, capsys):
    from nemo_kto.cli.main import main

    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor", "--json"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "this is rank 1 of 4" in said.err
    assert "unset RANK and WORLD_SIZE" in said.err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert main(["doctor"]) == 0
    assert capsys.readouterr() == ("", "")
