"""The memory that a job or a container may use, by trees of control groups as Slurm and Docker make them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_kto.doctor import cgroups, machine

GIB = 2**30
ABSURD = 2**63 - 4096
"""What the old interface writes where there is no limit."""
JOB = "system.slice/slurmstepd.scope/job_7/step_0/user/task_0"
OLD_JOB = "slurm/uid_1000/job_7/step_0"


def _limit(tmp_path: Path, own: str, files: dict[str, object]) -> int | None:
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    (tmp_path / "own").write_text(own)
    return cgroups.memory_limit(tmp_path / "cgroup", tmp_path / "own")


def _up(path: str, levels: int) -> str:
    return "/".join(path.split("/")[:-levels])


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({f"{JOB}/memory.max": "max", f"{_up(JOB, 3)}/memory.max": 4 * GIB}, 4 * GIB),
        ({f"{JOB}/memory.max": 3 * GIB, f"{_up(JOB, 3)}/memory.max": 4 * GIB}, 3 * GIB),
        ({f"{JOB}/memory.max": 3 * GIB, "memory.max": 2 * GIB}, 2 * GIB),
        ({f"{JOB}/memory.max": "max", "system.slice/memory.max": "max"}, None),
        ({"system.slice/sshd.service/memory.max": GIB, f"{_up(JOB, 3)}/../job_8/memory.max": GIB}, None),
        ({f"unified/{_up(JOB, 3)}/memory.max": 4 * GIB}, 4 * GIB),
        ({"memory.max": GIB}, GIB),
        ({}, None),
    ],
)
def test_the_new_interface(tmp_path, files, limit):
    (tmp_path / "cgroup" / _up(JOB, 3)).mkdir(parents=True)
    assert _limit(tmp_path, f"0::/{JOB}\n", files) == limit


@pytest.mark.parametrize("controllers", ["memory", "hugetlb,memory"])
@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({f"{OLD_JOB}/memory.limit_in_bytes": ABSURD, f"{_up(OLD_JOB, 1)}/memory.limit_in_bytes": 4 * GIB}, 4 * GIB),
        ({f"{OLD_JOB}/memory.limit_in_bytes": GIB, "memory.limit_in_bytes": ABSURD}, GIB),
        ({f"{OLD_JOB}/memory.limit_in_bytes": ABSURD, "memory.limit_in_bytes": ABSURD}, None),
        ({"memory.limit_in_bytes": GIB}, GIB),
    ],
)
def test_the_old_interface(tmp_path, controllers, files, limit):
    own = f"9:cpuset:/elsewhere\n4:{controllers}:/{OLD_JOB}\n0::/\n"
    others = {"cpuset/elsewhere/memory.limit_in_bytes": 1, "memory/elsewhere/memory.limit_in_bytes": 1}
    named = {f"memory/{name}": value for name, value in files.items()}
    assert _limit(tmp_path, own, others | named) == limit


@pytest.mark.parametrize("own", ["0::/docker/8a:b/x\n", "0::/../../job_7\n", "", "unheard of\n"])
def test_groups_that_a_container_does_not_see(tmp_path, own):
    """The path is the host's, and the container's own group is mounted as the root."""
    assert _limit(tmp_path, own, {"memory.max": GIB, "../job_7/memory.max": 1}) == GIB


def test_a_system_that_does_not_list_its_groups(tmp_path):
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    assert cgroups.memory_limit(tmp_path, tmp_path / "none") == GIB


def test_a_small_limit_is_a_warning(monkeypatch):
    monkeypatch.setattr(machine, "memory_limit", lambda: GIB)
    torch = {"version": "2", "cuda": None, "nccl": None, "cpu_capability": "AVX2"}
    finding = machine.devices(torch, {"devices": [], "why_none": ""})
    assert finding.facts["memory_limit_bytes"] == GIB
    assert any(line.endswith(", of which this job or container may use 1.0") for line in finding.lines)
    assert any("GiB of memory are left" in problem.what for problem in finding.problems)
