"""examples/slurm on a cluster of two nodes: trainings equal one of a single process, and outlive what befalls jobs.

The batch scripts are submitted as they are; partition, sizes and time limit are given to sbatch.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import trainings
from slurm_cluster import Cluster
from slurm_runs import SlurmRun, log_names, make_root
from trainings import LONG, LONG_WORDS, RUN_S, SHORT_WORDS, SLURM

pytestmark = [pytest.mark.launch, pytest.mark.timeout(2400)]

TP2 = "model.tensor_model_parallel_size=2"
BOTH = pytest.mark.parametrize("script", ["kto.sbatch", "kto_srun.sbatch"])
KILL_WAIT, SLURMD_TIMEOUT = 60, 20


@pytest.fixture(scope="module")
def cluster(machine) -> Iterator[Cluster]:
    with Cluster(Path(tempfile.mkdtemp(prefix="kto_")), kill_wait=KILL_WAIT, slurmd_timeout=SLURMD_TIMEOUT) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def no_job_stays(cluster) -> Iterator[None]:
    """A test that fails must not keep the next one from the nodes."""
    yield
    if cluster.client("squeue", "--noheader").strip():
        cluster.client("scancel", "--user=root")
    for name in ("kton1", "kton2"):
        if not cluster.hosts[name].is_up:
            cluster.boot(name)
    cluster.until(lambda: cluster.idle_nodes() == 2, 120, "the nodes do not come free")


@pytest.fixture(scope="module")
def trained(cluster, material) -> Callable[[str], SlurmRun]:
    """A whole training of four ranks by a script; each is run once."""

    @cache
    def by(script: str) -> SlurmRun:
        run = SlurmRun(cluster, script, material, script, *SHORT_WORDS, TP2, ranks_per_node=2)
        run.finish(starts=1)
        return run

    return by


@BOTH
def test_it_trains_as_one_process_does(script, trained, alone, row):
    entry = row(f"Slurm, {script}", 4)
    run = trained(script)
    assert trainings.deviations(run.results, alone) == []
    assert log_names(run.folder) == [f"{Path(script).stem}-{run.number}.out"]
    entry.result, entry.equal = "finished", "within 1e-5 of one process"


def test_both_ways_to_start_ranks_give_the_same_bits(trained):
    first, second = (trainings.lines(trained(script).results) for script in ("kto.sbatch", "kto_srun.sbatch"))
    assert first == second
    assert len(first) == 10


@BOTH
def test_in_a_container(script, cluster, material, alone, row):
    """The options of pyxis, by a stand-in whose image is a directory."""
    entry = row(f"Slurm, {script}, --container-image", 2)
    root = make_root(material.root / f"root-{script}", sys.executable)
    run = SlurmRun(cluster, script, material, f"contained-{script}", *SHORT_WORDS, ranks_per_node=1, **root)
    run.finish(starts=1)
    assert trainings.deviations(run.results, alone) == []
    entry.result, entry.equal = "finished", "within 1e-5 of one process"


def _is_whole(run, undisturbed, entry) -> None:
    assert trainings.lines(run.results) == undisturbed, run.log
    assert undisturbed[-1]["step"] == LONG
    entry.result, entry.equal = "finished", "bit for bit"


def _submit_urgent(cluster) -> int:
    words = ("--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--exclusive", "--output=/dev/null")
    return cluster.submit("sbatch", "--parsable", *words, "--wrap=srun true")


@BOTH
def test_preempted_it_makes_room_and_goes_on(script, cluster, material, undisturbed, row):
    entry = row(f"Slurm, {script}, preempted", 2)
    all_of_it = script != "kto.sbatch"
    name = f"preempted-{script}"
    run = SlurmRun(cluster, script, material, name, *LONG_WORDS, ranks_per_node=1, exports_all=all_of_it)
    run.until_step(12)
    urgent = _submit_urgent(cluster)
    entry.restart_s = run.until_again()
    assert cluster.state(urgent) == "COMPLETED"
    run.finish(starts=2)
    (resumed,) = trainings.resumed_at(run.log)
    assert f"stopped by SIGTERM after step {resumed} of {LONG}; the same command goes on from there; requeu" in run.log
    _is_whole(run, undisturbed, entry)


def test_preempted_before_it_can_heed_it(cluster, material, alone, row):
    """While torchrun or its ranks are still importing packages: some end by the signal, and nothing is saved."""
    entry = row("Slurm, kto.sbatch, preempted at once", 2)
    run = SlurmRun(cluster, "kto.sbatch", material, "at_once", *SHORT_WORDS, ranks_per_node=1)
    run.until_launched()
    urgent, began = _submit_urgent(cluster), time.monotonic()
    run.until(lambda: run.starts == 2 and trainings.last_step(run.results), "a step of the second start")
    entry.restart_s = time.monotonic() - began
    assert cluster.state(urgent) == "COMPLETED"
    run.finish(starts=2)
    assert trainings.resumed_at(run.log) == []
    assert trainings.deviations(run.results, alone) == []
    entry.result, entry.equal = "finished", "within 1e-5 of one process"


def test_before_its_time_is_up_it_saves_and_goes_on(cluster, material, undisturbed, row):
    entry = row("Slurm, kto_srun.sbatch, time limit", 2)
    often = (*LONG_WORDS[:-1], "trainer.kto.save_interval=2")  # it must last: Slurm looks at limits every 30 s
    run = SlurmRun(cluster, "kto_srun.sbatch", material, "limited", *often, ranks_per_node=1)
    run.until_step(12)
    hours, minutes, _ = map(int, cluster.job(run.number)["RunTime"].split(":"))
    # nearer than the 600 seconds of --signal: so the signal comes now, and the limit itself in some minutes
    cluster.set_limit(run.number, hours * 60 + minutes + 5)
    run.until(lambda: "stopped by SIGTERM" in run.log, "the signal")
    cluster.set_limit(run.number, 60)  # for the second start
    entry.restart_s = run.until_again()
    run.finish(starts=2)
    assert "stopped by SIGTERM after step " in run.log
    _is_whole(run, undisturbed, entry)


def test_requeued_by_hand_it_goes_on(cluster, material, undisturbed, row):
    entry = row("Slurm, kto.sbatch, scontrol requeue", 2)
    run = SlurmRun(cluster, "kto.sbatch", material, "requeued", *LONG_WORDS, ranks_per_node=1)
    run.until_step(12)
    cluster.client("scontrol", "requeue", str(run.number))
    entry.restart_s = run.until_again()
    run.finish(starts=2)
    assert "; requeueing" not in run.log  # once is enough
    _is_whole(run, undisturbed, entry)


def test_the_node_of_its_script_is_lost(cluster, material, undisturbed, row):
    """Slurm notices, and requeues."""
    entry = row("Slurm, kto_srun.sbatch, first node lost", 2)
    run = SlurmRun(cluster, "kto_srun.sbatch", material, "first_lost", *LONG_WORDS, ranks_per_node=1)
    run.until_step(22)
    cluster.hosts["kton1"].crash()
    run.until(lambda: cluster.state(run.number) == "PENDING", "requeued")
    cluster.boot("kton1")
    entry.restart_s = run.until_again()
    run.finish(starts=2)
    _is_whole(run, undisturbed, entry)


def test_another_node_is_lost(cluster, material, undisturbed, row):
    """Slurm takes five minutes to notice by default; the script, whose ranks have ended, must not fail meanwhile."""
    entry = row("Slurm, kto.sbatch, second node lost", 2)
    run = SlurmRun(cluster, "kto.sbatch", material, "second_lost", *LONG_WORDS, ranks_per_node=1)
    try:
        cluster.configure(kill_wait=5, slurmd_timeout=600)
        run.until_step(22)
        cluster.hosts["kton2"].crash()
        began = time.monotonic()
        run.until(lambda: "a node does not answer; waiting" in run.log, "noticed")
        cluster.boot("kton2")
        run.until_again()
        entry.restart_s = time.monotonic() - began
        run.finish(starts=2)
        assert "a node was lost; requeueing" in run.log
    finally:
        cluster.configure(kill_wait=KILL_WAIT, slurmd_timeout=SLURMD_TIMEOUT)
    _is_whole(run, undisturbed, entry)


@pytest.mark.parametrize("exports_all", [True, False], ids=["--export=ALL", "--export=NAMES"])
def test_what_cannot_succeed_fails_once(exports_all, cluster, material, row):
    entry = row(f"Slurm, kto.sbatch, wrong config{'' if exports_all else ', --export=NAMES'}", 2)
    name = f"wrong-{exports_all}"
    run = SlurmRun(
        cluster, "kto.sbatch", material, name, "model.optim.lrr=1", ranks_per_node=1, exports_all=exports_all
    )
    job = run.end()
    assert (job["JobState"], job["Restarts"], run.starts) == ("FAILED", "0", 1), run.story()
    assert "error: " in run.log
    assert "lrr" in run.log
    assert "requeueing" not in run.log
    assert "does not answer" not in run.log
    entry.result = "failed once, as it must"


def test_cancelled_it_stays_cancelled(cluster, material, row):
    """Its ranks save and leave their note all the same."""
    entry = row("Slurm, kto_srun.sbatch, scancel", 2)
    run = SlurmRun(cluster, "kto_srun.sbatch", material, "cancelled", *LONG_WORDS, ranks_per_node=1)
    run.until_step(2)
    cluster.client("scancel", str(run.number))
    assert run.end()["JobState"] == "CANCELLED", run.story()
    cluster.until(lambda: cluster.idle_nodes() == 2, 2 * KILL_WAIT, "the nodes do not come free")
    assert cluster.state(run.number) == "CANCELLED"
    assert run.starts == 1
    assert "stopped by SIGTERM" in run.log
    entry.result = "cancelled, as it must"


def test_starts_that_bring_nothing_are_counted(cluster, material, row):
    entry = row("Slurm, kto.sbatch, no time to begin", 2)
    run = SlurmRun(cluster, "kto.sbatch", material, "stalled", *LONG_WORDS, ranks_per_node=1)
    run.until_launched()
    (run.results / f"stalls.{run.number}").write_text("4\n")  # as four starts before would have left it
    cluster.client("scancel", "--signal=TERM", str(run.number))
    job = run.end()
    assert (job["JobState"], job["Restarts"], run.starts) == ("FAILED", "0", 1), run.story()
    assert "but 5 starts in a row brought no checkpoint" in run.log
    entry.result = "failed, as it must"


def test_another_program_has_its_port(cluster, material, row, tmp_path):
    entry = row("Slurm, kto.sbatch, its port taken", 2)
    number = int(re.search(r"NEXT_JOB_ID\s*=\s*(\d+)", cluster.client("scontrol", "show", "config"))[1])
    listen = f"import socket, time; s = socket.create_server(('', {20000 + number % 10000})); time.sleep(600)"
    with (tmp_path / "log").open("wb") as log:
        other = cluster.hosts["kton1"].start(sys.executable, "-c", listen, log=log)
    try:
        run = SlurmRun(cluster, "kto.sbatch", material, "port", *SHORT_WORDS, ranks_per_node=1)
        assert run.number == number
        run.finish(starts=1)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    entry.result = "finished"


@pytest.mark.parametrize("scheme", ["none", "lora"])
def test_prepare_train_export_follow_each_other(scheme, cluster, material, row):
    """The sequence length is given as an override alone, as `nemo-kto plan` prints it."""
    entry = row(f"Slurm, submit.sh: prepare, train{' LoRA' * (scheme == 'lora')}, export", 2)
    results, folder = material.root / f"chain-{scheme}", material.root / f"chain-{scheme}.submitted"
    folder.mkdir()
    variables = {key: value for key, value in material.variables(results).items() if key != "SEQ_LENGTH"}
    base = "model.kto.reference_from_path=${pretrained_checkpoint.restore_from_path}"
    peft = ("model.peft.peft_scheme=lora", base) if scheme == "lora" else ()
    sizes = {"TRAIN_OPTIONS": "--nodes=2", "RANKS_PER_NODE": "1", "TENSOR_PARALLEL": "1"}
    shown = cluster.client(
        *(str(SLURM / "submit.sh"), "--partition=batch", "--time=60", "--gpus-per-node=1", "--"),
        *material.words(*SHORT_WORDS, *peft),
        env={**variables, **sizes},
        cwd=folder,
    )
    prepare, train, export = (int(word) for word in shown.replace(",", "").split() if word.isdigit())
    logs = folder.glob
    for number in (prepare, train, export):
        job = cluster.wait(number, RUN_S)
        log = "".join(path.read_text() for path in logs(f"*-{number}.out"))
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert "tokenised:" not in "".join(path.read_text() for path in logs(f"kto-{train}.out"))  # prepare had done it
    checkpoint = Path((results / "latest_checkpoint.txt").read_text().strip())
    assert checkpoint.name == "step-000010"
    written = {path.name for path in (results / "hf").iterdir()}
    if scheme == "lora":
        assert {"adapter_config.json", "adapter_model.safetensors"} <= written
    else:
        assert {"config.json", "tokenizer.json"} <= written
        _check_weights(results / "hf", Path(variables["MODEL"]))
    shutil.rmtree(results / "hf")
    entry.result = "finished"


def _check_weights(exported: Path, start: Path) -> None:
    """Every weight of the model is there, and training has moved them."""
    import torch
    from safetensors.torch import load_file

    after, before = (load_file(next(path.glob("*.safetensors"))) for path in (exported, start))
    assert {name: weight.shape for name, weight in after.items()} == {name: w.shape for name, w in before.items()}
    assert any(not torch.equal(after[name], before[name]) for name in after)
