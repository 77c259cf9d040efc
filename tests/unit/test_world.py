"""What launchers' environments say: torchrun, plain srun, none, and contradictions."""

from __future__ import annotations

import pytest

from nemo_kto.config.world import World, meeting_point, tasks_per_node, unused_tasks, world_from_environment
from nemo_kto.errors import ConfigError

OTHERS = ("RANK", "WORLD_SIZE", "NEMO_KTO_STARTED_BY")
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NAME": "interactive",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    import os

    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_", "LOCAL_", "GROUP_", "TORCHELASTIC_")) or name in OTHERS:
            monkeypatch.delenv(name)
    return monkeypatch


def _set(environment: pytest.MonkeyPatch, *variables: dict[str, str]) -> None:
    for name, value in {name: value for more in variables for name, value in more.items()}.items():
        environment.setenv(name, value)


def test_alone(environment):
    assert world_from_environment() == World(0, 1, 1, launched=False)


TORCHRUN = {
    **{"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"},
    **{"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"},
}


def test_torchrun(environment):
    _set(environment, TORCHRUN)
    world = world_from_environment()
    assert world == World(9, 16, 8, launched=True, local_rank=1, node_rank=1, launcher="torchrun")
    assert world.num_nodes == 2


def test_variables_set_by_hand_say_all_but_the_launcher(environment):
    _set(environment, {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")})
    world = world_from_environment()
    assert (world.node_rank, world.launcher) == (1, "RANK and WORLD_SIZE in the environment")
    environment.setenv("NEMO_KTO_STARTED_BY", "1")
    assert world_from_environment().launcher == "nemo-kto"


def test_torchrun_in_a_task_of_srun_per_node_wins(environment):
    """Slurm's numbers are those of the agents then."""
    _set(environment, SRUN, {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, TORCHRUN)
    world = world_from_environment()
    assert (world.rank, world.size, world.local_size, world.num_nodes) == (9, 16, 8, 2)
    assert world.launcher == "torchrun in Slurm job 1234"


def test_plain_srun_without_tasks_per_node_and_under_any_job_name(environment):
    _set(environment, SRUN)
    world = world_from_environment()
    assert world == World(5, 8, 4, True, local_rank=1, node_rank=1, launcher="srun in Slurm job 1234")
    assert meeting_point() == ("gpu07", 15000 + 2340)
    _set(environment, {"MASTER_ADDR": "head", "MASTER_PORT": "29500"})
    assert meeting_point() == ("head", 29500)


def test_a_step_may_be_smaller_than_its_job(environment):
    """As ``srun -N1 -n2`` in a job of 2 nodes and 8 tasks."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    _set(environment, SRUN, step, {"SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_PROCID": "1", "SLURM_NODEID": "0"})
    world = world_from_environment()
    assert (world.rank, world.size, world.num_nodes, world.local_size) == (1, 2, 1, 2)


def test_ranks_dealt_out_in_turn_know_their_node(environment):
    """``srun -m cyclic``: rank 5 of 8 on 2 nodes is the third on the second node."""
    _set(environment, SRUN, {"SLURM_LOCALID": "2", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"})
    world = world_from_environment()
    assert (world.rank, world.local_rank, world.node_rank) == (5, 2, 1)


@pytest.mark.parametrize(
    ("tasks", "nodes", "spread", "said"),
    [
        ("5", "3", "2(x2),1", "5 tasks on 3 nodes as 2(x2),1, and every node must run the same number. 5 = 3 x 1 + 2"),
        ("4", "2", "3,1", "4 tasks on 2 nodes as 3,1, .* 4 = 2 x 2: give srun, or sbatch, --ntasks-per-node=2"),
        ("5", "2", None, "5 tasks on 2 nodes, .* 5 = 2 x 2 + 1: give srun another --ntasks, or fewer nodes"),
    ],
)
@pytest.mark.parametrize("prefix", ["SLURM_STEP_", "SLURM_"])
def test_uneven_tasks_are_refused_with_the_sum(environment, tasks, nodes, spread, said, prefix):
    """Plain ``srun -N2 -n4`` may do this: 3 tasks on a node with free cores, 1 on the other."""
    _set(environment, SRUN, {"SLURM_NTASKS": tasks, "SLURM_NNODES": nodes, "SLURM_PROCID": "0"})
    if spread is not None:
        environment.setenv(f"{prefix}TASKS_PER_NODE", spread)
    with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace(")", r"\)").replace("+", r"\+")):
        world_from_environment()


def test_uneven_agents_of_torchrun_are_refused_with_the_sum(environment):
    """2 + 2 + 4: each node's own number divides the world."""
    _set(environment, TORCHRUN, {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "3"})
    with pytest.raises(ConfigError, match=r"3 x 2 = 6\. Start every torchrun with the same --nproc-per-node"):
        world_from_environment()


@pytest.mark.parametrize(("text", "counts"), [("2(x3),1", [2, 2, 2, 1]), ("4", [4]), ("1,3(x2)", [1, 3, 3])])
def test_slurms_short_form(text, counts):
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize("text", ["", "2x3", "2(x3", "two"])
def test_what_is_not_slurms_short_form(text):
    with pytest.raises(ConfigError, match="not like"):
        tasks_per_node(text)


BATCH = {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NUM_NODES": "2"}


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"])
def test_a_batch_script_is_one_process_and_is_told_what_it_leaves(environment, step):
    """And so is a shell of salloc, with or without a step of its own."""
    _set(environment, BATCH)
    environment.delenv("SLURM_STEP_ID")
    if step is not None:
        environment.setenv("SLURM_STEP_ID", step)
    world = world_from_environment()
    assert world == World(0, 1, 1, launched=False)
    said = unused_tasks(world)
    assert said == (
        "Slurm job 1234 has 2 node(s) and 8 task(s), and this is one process that uses one of them: put srun before "
        "the command"
    )
    environment.delenv("SLURM_PROCID")  # a shell of salloc on a login node has no such variable
    assert world_from_environment() == world


def test_a_step_of_one_task_may_start_its_own_processes(environment):
    """``srun --pty bash``, the usual interactive session."""
    _set(environment, BATCH, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"})
    world = world_from_environment()
    assert world == World(0, 1, 1, launched=False)
    assert unused_tasks(world) is None


def test_nothing_is_left_where_nothing_was_allotted(environment):
    assert unused_tasks(world_from_environment()) is None
    _set(environment, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"})
    assert unused_tasks(world_from_environment()) is None
    _set(environment, BATCH)
    assert unused_tasks(world_from_environment()) is None, "srun's own tasks"


def test_lightning_is_told_the_same(environment):
    from nemo_kto.training.environment import LaunchedEnvironment

    _set(environment, SRUN)
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
        {"RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "1"},
        {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4x2"},
        {**SRUN, "SLURM_NODEID": "2"},
    ],
)
def test_contradictions_are_refused(environment, wrong):
    _set(environment, wrong)
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
