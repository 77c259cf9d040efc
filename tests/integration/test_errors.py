"""Whatever is wrong, the command line says so once, naming the culprit and the fix, with the promised exit code."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import bad_inputs
import psutil
import pytest

from nemo_kto.cli.main import main
from nemo_kto.data.problems import MAX_LISTED

pytestmark = pytest.mark.integration

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")


@pytest.fixture(scope="module")
def here(tmp_path_factory, tiny_llama) -> Path:
    """A folder with a good model and good data, and everything that can be wrong with either."""
    return bad_inputs.make(tmp_path_factory.mktemp("errors"), tiny_llama)


TP, PP = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"
TRAIN, VALIDATION = "model.data.data_prefix.train", "model.data.data_prefix.validation"
MODEL = "pretrained_checkpoint.restore_from_path"
CONFIG, FILES = 2, 3

CASES = {
    # what is asked for cannot be done
    "unknown key": (["model.optim.learning_rate=1"], CONFIG, ["unknown config key model.optim.learning_rate"]),
    "near miss": (["model.kto.kl_klamp=per_sample"], CONFIG, ["did you mean model.kto.kl_clamp?"]),
    "type": (["model.global_batch_size=many"], CONFIG, ["model.global_batch_size: Value 'many'"]),
    "no list": ([f"{TRAIN}=good.jsonl"], CONFIG, [f"{TRAIN} must be a list"]),
    "preset": (["loss=dpo"], CONFIG, ["loss/dpo", "apo_zero_unpaired kto kto_paper"]),
    "not built": (["model.peft.peft_scheme=lora"], CONFIG, ["model.peft.peft_scheme=lora", "use none"]),
    "batch of one": (["model.global_batch_size=1"], CONFIG, ["model.global_batch_size=1", "at least 2"]),
    "arithmetic": (
        ["model.global_batch_size=8", "model.micro_batch_size=3"],
        CONFIG,
        ["model.global_batch_size 8 is not a multiple of model.micro_batch_size 3 x data_parallel 1"],
    ),
    "world": ([f"{TP}=2"], CONFIG, ["world size 1 is not a multiple of", "= 2: start a multiple of 2 processes"]),
    "heads": (["trainer.devices=3", f"{TP}=3"], CONFIG, [f"{TP}=3 does not divide", "4 attention heads % 3 = 1"]),
    "layers": (["trainer.devices=3", f"{PP}=3"], CONFIG, [f"{PP}=3 does not divide", "Sizes that do: 1, 2, 4"]),
    "length": (["model.data.seq_length=300"], CONFIG, ["model.data.seq_length=300", "max_position_embeddings 256"]),
    "schedule": (
        ["trainer.kto.max_steps=4", "model.optim.sched.warmup_steps=4"],
        CONFIG,
        ["model.optim.sched: warmup_steps 4", "the 4 steps of this run", "train longer"],
    ),
    "nodes": (["trainer.num_nodes=2"], CONFIG, ["trainer.num_nodes=2", "one torchrun per node"]),
    "output": (["exp_manager.explicit_log_dir=a_file/out"], CONFIG, ["exp_manager.explicit_log_dir=a_file/out"]),
    "time": (["exp_manager.max_time_per_run=1h"], CONFIG, ["exp_manager.max_time_per_run=1h", "DD:HH:MM:SS"]),
    "no yaml": (["--config-name", "mine", "--config-dir", "nothing"], CONFIG, ["nothing holds no mine.yaml"]),
    "no model": ([f"{MODEL}=null"], CONFIG, [f"{MODEL} is not set"]),
    "model not there": ([f"{MODEL}=gone"], CONFIG, [f"{MODEL}=gone does not exist"]),
    "model is a file": ([f"{MODEL}=a_file"], CONFIG, [f"{MODEL}=a_file is not a directory"]),
    "other reference": (
        ["model.kto.reference_from_path=deeper"],
        CONFIG,
        ["model.kto.reference_from_path=deeper", "num_layers is 8, not 4"],
    ),
    # data
    "no file": ([f"{TRAIN}=[gone.jsonl]"], FILES, ["gone.jsonl: does not exist"]),
    "empty file": ([f"{TRAIN}=[empty.jsonl]"], FILES, ["empty.jsonl: is empty"]),
    "kind of file": ([f"{TRAIN}=[data.csv]"], FILES, ["data.csv: is of an unknown kind", ".parquet"]),
    "folder": ([f"{TRAIN}=[folder.jsonl]"], FILES, ["folder.jsonl: is a directory"]),
    "twice": ([f"{TRAIN}=[good.jsonl,good.jsonl]"], FILES, ["good.jsonl: is listed twice"]),
    "not json": ([f"{TRAIN}=[not_json.jsonl]"], FILES, ["not_json.jsonl:3: not JSON", "column 2"]),
    "no keys": ([f"{TRAIN}=[no_keys.jsonl]"], FILES, ["no_keys.jsonl:2: has no prompt"]),
    "pairs": ([f"{TRAIN}=[pairs.jsonl]"], FILES, ["pairs.jsonl:1", "split the pair into two records"]),
    "label": (
        [f"{TRAIN}=[label.jsonl]"],
        FILES,
        ["label.jsonl:2: preference is 'good'", '"chosen", "rejected", 1, 0'],
    ),
    "no response": ([f"{TRAIN}=[empty_response.jsonl]"], FILES, ["empty_response.jsonl:1: response is empty"]),
    "role": ([f"{TRAIN}=[chat.jsonl]"], FILES, ["chat.jsonl:1: prompt[0].role is 'robot'"]),
    "many": ([f"{TRAIN}=[many.jsonl]"], FILES, ["problems (30)", "many.jsonl:20", "... and 10 more"]),
    "encoding": ([f"{TRAIN}=[latin.jsonl]"], FILES, ["latin.jsonl:1", "UTF-8"]),
    "gzip": ([f"{TRAIN}=[cut.jsonl.gz]"], FILES, ["cut.jsonl.gz:", "gzip"]),
    "parquet": ([f"{TRAIN}=[broken.parquet]"], FILES, ["broken.parquet"]),
    "validation": ([f"{VALIDATION}=[label.jsonl]"], FILES, ["label.jsonl:2"]),
    "too few": ([f"{TRAIN}=[two.jsonl]"], FILES, ["2 rows, fewer than model.global_batch_size=4"]),
    "all too long": ([f"{TRAIN}=[long.jsonl]"], FILES, ["all 9 records of long.jsonl", "model.data.seq_length=64"]),
    "overlong": ([f"{TRAIN}=[long.jsonl]", "model.data.overlong=error"], FILES, ["long.jsonl:1", "64"]),
    # models
    "no model there": ([f"{MODEL}=nothing"], FILES, ["nothing is no model directory", "config.json"]),
    "no hf side": ([f"{MODEL}=megatron"], FILES, ["megatron is a Megatron checkpoint without hf/config.json"]),
    "config.json": ([f"{MODEL}=garbled"], FILES, ["garbled/config.json: not valid JSON"]),
    "architecture": ([f"{MODEL}=bert"], FILES, ["bert/config.json: model_type", "LlamaForCausalLM"]),
    "experts": ([f"{MODEL}=moe"], FILES, ["moe/config.json: num_local_experts"]),
    "quantized": ([f"{MODEL}=quantized"], FILES, ["quantized/config.json: quantization_config"]),
    "rope": ([f"{MODEL}=yarn"], FILES, ["yarn/config.json: rope_parameters.rope_type: 'yarn'", "llama3"]),
    "tokenizer": ([f"{MODEL}=no_tokenizer"], FILES, ["no_tokenizer", "tokenizer"]),
    "resume": (["exp_manager.resume_from_checkpoint=model"], FILES, ["exp_manager.resume_from_checkpoint=model"]),
    "nothing to resume": (
        ["exp_manager.resume_ignore_no_checkpoint=false"],
        FILES,
        ["out/checkpoints holds no checkpoint", "resume_ignore_no_checkpoint=true starts anew"],
    ),
    "earlier run": (
        ["exp_manager.resume_if_exists=false", "exp_manager.explicit_log_dir=earlier"],
        FILES,
        ["earlier/checkpoints/step-000007 is of an earlier run", "another exp_manager.explicit_log_dir"],
    ),
}

ENVIRONMENTS = {
    "devices": ({"RANK": "0", "WORLD_SIZE": "2"}, ["trainer.devices=4"], ["trainer.devices=4", "launcher started 2"]),
    "nodes": (
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
        ["trainer.num_nodes=1"],
        ["trainer.num_nodes=1", "launcher started 2"],
    ),
    "rank": ({"RANK": "2", "WORLD_SIZE": "2"}, [], ["rank 2, world size 2"]),
    "uneven": ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}, [], ["world size 3, 2 per node"]),
    "junk": ({"RANK": "0", "WORLD_SIZE": "two"}, [], ["WORLD_SIZE='two'"]),
    "slurm": (
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_NNODES": "1"},
        [f"{TP}=4"],
        ["world size 2 is not a multiple of"],
    ),
}


@pytest.fixture
def command_line(here, monkeypatch, capsys):
    """Run ``nemo-kto train`` in this process: exit code and standard error. Puts back what it sets."""
    monkeypatch.chdir(here)
    before, logger = dict(os.environ), logging.getLogger("nemo_kto")
    state = (logger.handlers[:], logger.propagate, logger.level)
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)

    def run(words: list[str]) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["train", *_arguments(words)])
        return code, capsys.readouterr().err

    yield run
    os.environ.clear()
    os.environ.update(before)
    logger.handlers, logger.propagate = state[0], state[1]
    logger.setLevel(state[2])


def _arguments(words: list[str]) -> list[str]:
    """A run that would work, but for ``words``."""
    given = [f"{MODEL}=model", f"{TRAIN}=[good.jsonl]", "model.global_batch_size=4", "model.data.seq_length=64"]
    given += ["exp_manager.explicit_log_dir=out", "model.data.cache_dir=cache", "model.data.tokenize_workers=1"]
    given += ["trainer.precision=32", "model.optim.sched.warmup_steps=1"]
    keys = {word.split("=")[0] for word in words}
    return [*[word for word in given if word.split("=")[0] not in keys], *words]


def _check(code: int, text: str, expected: int, fragments: list[str], here: Path) -> None:
    assert code == expected, text
    said = [line for line in text.splitlines() if not line.startswith("info: ")]
    assert said[0].startswith("error: ")
    assert text.count("error: ") == 1
    assert "Traceback" not in text
    for fragment in fragments:
        assert fragment in text
    listed = 1 + MAX_LISTED + 1 if "problems (" in said[0] else 1  # a title, the problems, how many more
    assert len(said) <= listed, text
    assert not any((here / "out").glob("**/*")), "the output directory must be left clean"


@pytest.mark.parametrize("name", CASES)
def test_an_error_is_said_once(name, command_line, here):
    words, expected, fragments = CASES[name]
    code, text = command_line(words)
    _check(code, text, expected, fragments, here)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_launch_that_cannot_be_is_an_error(name, command_line, here, monkeypatch):
    environment, words, fragments = ENVIRONMENTS[name]
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    code, text = command_line(words)
    _check(code, text, CONFIG, fragments, here)


def test_several_mistakes_are_said_together(command_line):
    code, text = command_line(["model.optim.lr=0", "model.kto.kl_clamp=x", "trainer.precision=8"])
    assert code == CONFIG
    assert [key in text for key in ("model.optim.lr=0.0", "model.kto.kl_clamp=x", "trainer.precision=8")] == [True] * 3


# --- in processes of their own


def _process(words: list[str], here: Path, *python: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    env |= {"OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *(python or ("-m", "nemo_kto.cli.main")), "train", *_arguments(words)]
    return subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=200, check=False)


def test_nothing_heavy_is_imported_for_a_config_error(here):
    code = (
        "import sys\nfrom nemo_kto.cli.main import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'torch', 'nemo', 'megatron', 'lightning', 'transformers'}\n"
        "print(*sorted(heavy & {m.split('.')[0] for m in sys.modules}))\nsys.exit(code)"
    )
    done = _process(["model.micro_batch_size=3"], here, "-c", code)
    assert (done.returncode, done.stdout.strip()) == (CONFIG, "")
    assert done.stderr.startswith("error: model.global_batch_size 4 is not a multiple of")


def test_a_world_of_the_wrong_size_is_said_before_it_starts(here):
    done = _process(["trainer.devices=2", f"{TP}=4"], here)
    assert (done.returncode, done.stdout) == (CONFIG, "")
    said = f"error: world size 2 is not a multiple of {TP} 4 x {PP} 1 = 4: start a multiple of 4 processes"
    assert done.stderr.splitlines() == [said]


def test_a_corrupt_checkpoint_stops_all_ranks_with_one_message(here, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    checkpoint.mkdir(parents=True)
    versions = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    numbers = {f"{key}_version": 1 for key in versions}
    (checkpoint / "metadata.json").write_text(json.dumps({**versions, **numbers}))
    for name in (".metadata", "common.pt", "__0_0.distcp"):
        (checkpoint / name).write_bytes(b"not what it should be")
    done = _process(["trainer.devices=2", f"exp_manager.explicit_log_dir={tmp_path / 'run'}"], here)
    assert done.returncode == FILES, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert f"error: {checkpoint} is damaged, or was saved by another model" in done.stderr.splitlines()[-1]
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step-000003"], "nothing was written or removed"


KILLS_RANK_1 = """
import os, pathlib, signal, threading, time
def wait():
    while not pathlib.Path({metrics!r}).exists():
        time.sleep(0.1)
    pathlib.Path({stamp!r}).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get("RANK") == "1":
    threading.Thread(target=wait, daemon=True).start()
"""
"""Found by every Python process through PYTHONPATH: takes one rank down in the middle of training."""


def test_a_rank_that_dies_takes_the_others_down(here, tmp_path):
    out, stamp = tmp_path / "run", tmp_path / "died"
    script = KILLS_RANK_1.format(metrics=str(out / "metrics.jsonl"), stamp=str(stamp))
    (tmp_path / "sitecustomize.py").write_text(script)
    words = ["trainer.devices=2", "trainer.kto.max_epochs=100000", f"exp_manager.explicit_log_dir={out}"]
    done = _process(words, here, PYTHONPATH=str(tmp_path))
    assert time.time() - float(stamp.read_text()) < 60
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: process 1 of 2 was ended by SIGKILL"
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(out) in " ".join(p.info["cmdline"] or [])]
    assert left == []
