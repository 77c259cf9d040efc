"""What launchers' environments say: torchrun, plain srun, none, and contradictions."""

from __future__ import annotations

import pytest

from nemo_kto.config.world import World, meeting_point, world_from_environment
from nemo_kto.errors import ConfigError

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NAME": "interactive",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    import os

    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_", "LOCAL_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    return monkeypatch


def test_alone(environment):
    assert world_from_environment() == World(0, 1, 1, launched=False)


def test_torchrun(environment):
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}.items():
        environment.setenv(name, value)
    world = world_from_environment()
    assert world == World(9, 16, 8, launched=True, local_rank=1)
    assert (world.num_nodes, world.node_rank) == (2, 1)


def test_plain_srun_without_tasks_per_node_and_under_any_job_name(environment):
    for name, value in SRUN.items():
        environment.setenv(name, value)
    world = world_from_environment()
    assert world == World(5, 8, 4, launched=True, local_rank=1)
    assert meeting_point() == ("gpu07", 15000 + 2340)
    environment.setenv("MASTER_ADDR", "head")
    environment.setenv("MASTER_PORT", "29500")
    assert meeting_point() == ("head", 29500)


def test_lightning_is_told_the_same(environment):
    from nemo_kto.training.environment import LaunchedEnvironment

    for name, value in SRUN.items():
        environment.setenv(name, value)
    told = LaunchedEnvironment(world_from_environment())
    assert (told.global_rank(), told.world_size(), told.local_rank(), told.node_rank()) == (5, 8, 1, 1)
    assert (told.main_address, told.creates_processes_externally) == ("gpu07", True)


@pytest.mark.parametrize(
    ("nodes", "head"), [("n1", "n1"), ("n[3,7]", "n3"), ("a-b[03-09,12],c", "a-b03"), ("x,y", "x")]
)
def test_the_first_node_is_the_meeting_point(environment, nodes, head):
    environment.setenv("SLURM_JOB_ID", "1")
    environment.setenv("SLURM_STEP_NODELIST", nodes)
    assert meeting_point()[0] == head


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "5"},
    ],
)
def test_contradictions_are_refused(environment, wrong):
    for name, value in wrong.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match="environment"):
        world_from_environment()


def test_no_meeting_point(environment):
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        meeting_point()


@pytest.mark.parametrize(("name", "value", "other"), [("WORLD_SIZE", "2", "RANK"), ("RANK", "1", "WORLD_SIZE")])
def test_half_of_a_launchers_environment_is_refused(environment, name, value, other):
    environment.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"{name}={value} in the environment, but no {other}"):
        world_from_environment()
    environment.setenv(name, "1" if name == "WORLD_SIZE" else "0")
    assert world_from_environment() == World(0, 1, 1, launched=False)
