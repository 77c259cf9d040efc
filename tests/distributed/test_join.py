"""Joining a job: together, and every way in which that fails: said once by each rank that is there, and soon."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from join_ranks import JOIN_S

from nemo_kto.peers import GRACE_S

pytestmark = pytest.mark.distributed

CONFIG, LOST, STOPPED = 2, 1, 4
SLACK_S = 15.0
"""Beyond the time that ranks are meant to wait: a dozen processes run at once on few cores."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ranks(size: int, acts: dict[int, str], port: int | None = None, **environment: str) -> dict[int, list[object]]:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or _free_port()), **environment}
    return {
        rank: [act, {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), **address}]
        for rank, act in acts.items()
    }


def _late(case: dict[int, list[object]], rank: int, seconds: float) -> dict[int, list[object]]:
    case[rank][1]["LATE"] = str(seconds)
    return case


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[int, tuple[int, float, str]]]:
    folder: Path = tmp_path_factory.mktemp("join")
    everybody = dict.fromkeys(range(3), "sum")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1"}
    with ExitStack() as stack:
        silent = stack.enter_context(socket.socket())
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        taken = silent.getsockname()[1]
        cases = {
            "together": _ranks(3, everybody),
            "alone": {0: ["sum", {}]},
            "two missing": _ranks(5, dict.fromkeys((0, 2, 4), "joined")),
            "first missing": _ranks(2, {1: "joined"}),
            "too late": _late(_ranks(3, dict.fromkeys(range(3), "joined")), 2, JOIN_S + 1.5),
            "taken": _ranks(2, {0: "joined", 1: "joined"}, taken),
            "no such host": _ranks(2, {0: "joined", 1: "joined"}, MASTER_ADDR="no.such.host.invalid"),
            "told to stop": _ranks(2, {0: "told"}),
            "failed": _ranks(2, {0: "wait", 1: "fail"}),
            "died": _ranks(2, {0: "receive", 1: "die"}),
            "first died": _ranks(2, {0: "die", 1: "wait"}),
            "slurm": {
                rank: ["sum", {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", **slurm}]
                for rank in range(2)
            },
        }
        file, results = folder / "cases.json", folder / "results.json"
        file.write_text(json.dumps(cases))
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        env = {key: value for key, value in os.environ.items() if key not in launcher}
        env |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # as nemo_kto.quiet sets it
        script = Path(__file__).with_name("join_ranks.py")
        subprocess.run([sys.executable, script, file, results], env=env, check=True, timeout=200)
    read = json.loads(results.read_text())
    return {case: {int(rank): tuple(end) for rank, end in ranks.items()} for case, ranks in read.items()}


def _ends(case: dict[int, tuple[int, float, str]], code: int, waited: float) -> str:
    """All ranks ended with this code, in time, with the same single line: that line."""
    assert [end[0] for end in case.values()] == [code] * len(case), case
    assert max(end[1] for end in case.values()) < waited + SLACK_S, case
    said = {end[2] for end in case.values()}
    assert len(said) == 1, said
    text = said.pop()
    assert text.count("\n") == 1, text
    return text


@pytest.mark.parametrize("name", ["together", "alone", "slurm"])
def test_all_ranks_join_and_may_join_again(name, found):
    assert {rank: end[0] for rank, end in found[name].items()} == dict.fromkeys(found[name], 0), found[name]
    assert {end[2] for end in found[name].values()} == {""}


def test_the_missing_are_named_by_all_who_came(found):
    said = _ends(found["two missing"], CONFIG, JOIN_S)
    assert said.startswith("error: ranks 1, 3 of 5 did not join within 4 s: their own logs say why; or start as many")
    assert "trainer.join_timeout_minutes" in said


def test_without_rank_0_there_is_nobody_to_meet(found):
    said = _ends(found["first missing"], CONFIG, JOIN_S)
    assert re.match(
        r"error: rank 0 did not listen at MASTER_ADDR=127.0.0.1, MASTER_PORT=\d+ within 4 s \(Connection refused\)",
        said,
    )


def test_a_rank_that_comes_too_late_fails_too(found):
    """It must not go on alone: the others have given up."""
    case = found["too late"]
    assert [case[rank][0] for rank in range(3)] == [CONFIG] * 3, case
    assert {case[rank][2] for rank in (0, 1)} == {case[0][2]}
    assert case[0][2].startswith("error: rank 2 of 3 did not join within 4 s: ")
    assert case[2][1] < 3 * JOIN_S + SLACK_S


def test_a_port_in_use_is_named(found):
    first, second = found["taken"][0], found["taken"][1]
    assert (first[0], second[0]) == (CONFIG, CONFIG)
    assert re.match(r"error: MASTER_PORT=\d+ is in use on 127.0.0.1, .*: set MASTER_PORT to a free port", first[2])
    assert first[1] < SLACK_S, "nothing to wait for"
    # the program that has the port accepts the connection and says nothing, for ever
    assert re.match(
        r"error: 127.0.0.1:\d+ does not answer as rank 0 would.*another program uses MASTER_PORT", second[2]
    )
    assert second[1] < JOIN_S + SLACK_S


def test_an_address_that_means_nothing_is_named(found):
    said = _ends(found["no such host"], CONFIG, 30.0)  # a name service may be asked again for so long
    assert said.startswith("error: MASTER_ADDR=no.such.host.invalid cannot be resolved (")
    assert "set it to the host name or address of the node where rank 0 runs" in said


def test_a_signal_ends_the_wait(found):
    said = _ends(found["told to stop"], STOPPED, 1.0)
    assert said.startswith("error: stopped by SIGTERM before all ranks had joined; nothing has begun")


def test_a_rank_that_fails_takes_down_one_that_only_waits(found):
    """As under NCCL, which may not notice: nothing but the store tells."""
    code, seconds, said = found["failed"][0]
    assert (code, said.count("\n")) == (LOST, 1)
    assert said.startswith("error: rank 1 failed: a shard is missing; this rank was still waiting for it, and ends")
    assert seconds < GRACE_S + SLACK_S < 30


def test_a_rank_that_dies_is_one_line_at_the_others(found):
    assert found["died"][1][0] == -9
    code, seconds, said = found["died"][0]
    assert (code, said.count("\n")) == (LOST, 1), said
    assert re.match(
        r"error: lost contact with another rank \([^()]*Connection (closed|reset) by peer[^()]*\): its own", said
    )
    assert seconds < SLACK_S


def test_losing_the_store_ends_a_rank_that_only_waits(found):
    assert found["first died"][0][0] == -9
    code, seconds, said = found["first died"][1]
    assert code == LOST
    assert "error: lost contact with rank 0 or its launcher; this rank was still waiting for it, and ends\n" in said
    assert "Traceback" not in said
    assert seconds < GRACE_S + SLACK_S < 30
