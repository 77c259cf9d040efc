"""``model.kto.reference=cache`` and ``cache-reference`` from the command line: the same training, less is scored."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from command_line import read_metrics
from train_runs import CLOCK, make_files

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).with_name("several_commands.py")
ROWS, HELDOUT, BATCH = 20, 6, 4  # 5 steps per epoch, and none left over
WORDS = [
    *("pretrained_checkpoint.restore_from_path=other", "model.kto.reference_from_path=model"),
    *("model.data.data_prefix.train=[train.jsonl]", "model.data.data_prefix.validation=[heldout.jsonl]"),
    *("model.data.cache_dir=tokens", "model.data.seq_length=64", "model.data.num_workers=0"),
    # each row by itself: its number does not depend on neighbours, which the shuffle changes from epoch to epoch
    *(f"model.global_batch_size={BATCH}", "model.micro_batch_size=1", "model.data.packing=false"),
    "trainer.precision=32",
    *("model.optim.lr=1e-3", "model.optim.sched.name=Constant", "model.optim.sched.warmup_steps=2"),
    *("trainer.kto.max_epochs=2", "trainer.kto.val_check_interval=5", "trainer.kto.save_interval=1"),
    *("exp_manager.checkpoint_callback_params.save_top_k=-1", "exp_manager.checkpoint_callback_params.save_last_k=99"),
]
LORA = [
    *("pretrained_checkpoint.restore_from_path=model", "model.peft.peft_scheme=lora"),
    *("model.peft.lora_tuning.adapter_dim=4", "model.optim.lr=1e-2", "trainer.kto.max_epochs=1"),
]
CACHE, PLACE, FIXED = "model.kto.reference=cache", "model.kto.reference_cache_dir", "model.kto.fixed_pairs=true"
COST = {*CLOCK, "reference_rows_computed", "val/reference_rows_computed"}


def _changed(words: list[str], *changes: str) -> list[str]:
    keys = {change.split("=")[0] for change in changes}
    return [*(word for word in words if word.split("=")[0] not in keys), *changes]


def _run(root: Path, name: str, commands: list[tuple[str, list[str]]]) -> dict[str, str]:
    """What each command printed, by its directory."""
    (root / f"{name}.json").write_text(json.dumps(commands))
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), f"{name}.json"],
        cwd=root,
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return {part.split("\n")[0]: part for part in done.stdout.split("=== ")[1:]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    return make_files(root, ROWS, HELDOUT)


@pytest.fixture(scope="module")
def runs(root):
    shared = _changed(WORDS, CACHE, f"{PLACE}=shared")
    fixed = _changed(WORDS, CACHE, FIXED)
    _run(
        root,
        "full",
        [
            ("swap", ["train", *WORDS]),
            ("cold", ["train", *shared]),
            ("warm", ["train", *shared]),
            ("fixed", ["train", *fixed]),
            ("fixed>resumed:3", ["train", *fixed]),
            ("fixed>empty:3", ["train", *fixed, f"{PLACE}=empty_cache"]),
        ],
    )
    return root


def _lines(out: Path, kind: str) -> list[dict]:
    """Of training or validation, without what they cost."""
    lines = read_metrics(out / "metrics.jsonl")
    chosen = [line for line in lines if ("val/loss" in line) == (kind == "validation")]
    return [{key: value for key, value in line.items() if key not in COST} for line in chosen]


def _computed(out: Path) -> list[int]:
    """Rows scored anew: per step, and at the end of each epoch for its validation."""
    lines = read_metrics(out / "metrics.jsonl")
    return [line.get("reference_rows_computed", line.get("val/reference_rows_computed")) for line in lines]


def _same_run(one: Path, other: Path) -> None:
    for kind in ("training", "validation"):
        assert _lines(one, kind) == _lines(other, kind)
    assert len(_lines(one, "training")) == 10


def _state(out: Path) -> dict[str, object]:
    files = json.loads((out / "checkpoints" / "step-000010" / "manifest.json").read_text())["files"]
    return {name: record for name, record in files.items() if name.endswith((".distcp", ".safetensors"))}


@pytest.mark.parametrize("name", ["cold", "warm"])
def test_a_run_with_a_cache_is_the_run_without_bit_for_bit(name, runs):
    """Another reference than the start: its weights are read in the middle of the training."""
    _same_run(runs / "swap", runs / name)
    assert _state(runs / "swap") == _state(runs / name)
    assert _lines(runs / name, "training")[0]["rewards/margins"] != 0.0


def test_the_second_run_scores_nothing_and_moves_nothing(runs):
    epoch = [2 * BATCH] * 5
    first, second = _computed(runs / "cold"), _computed(runs / "warm")
    assert first[:6] == [*epoch, 2 * HELDOUT]
    assert all(BATCH >= rows >= 0 for rows in first[6:11]), "samples are known, and most pairs are new"
    assert sum(first[6:11]) > 0
    assert first[11] == 0, "validation has the same pairs every time"
    assert second == [0] * 12
    moved = [line["reference_bytes"] for line in read_metrics(runs / "warm" / "metrics.jsonl") if "loss" in line]
    assert moved == [0] * 10


def test_with_fixed_pairs_the_second_epoch_scores_nothing(runs):
    assert _computed(runs / "fixed") == [*[2 * BATCH] * 5, 2 * HELDOUT, *[0] * 6]
    assert _lines(runs / "fixed", "training") != _lines(runs / "cold", "training")


@pytest.mark.parametrize("name", ["resumed", "empty"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, runs):
    """With the cache it left, which knows all; and without, from the reference that the run has kept."""
    _same_run(runs / "fixed", runs / name)
    assert _state(runs / "fixed") == _state(runs / name)
    after = _computed(runs / name)[3:]
    assert after == ([0] * 9 if name == "resumed" else [*[2 * BATCH] * 2, 2 * HELDOUT, *after[3:]])
    if name == "empty":
        assert sum(after[3:]) == 2 * 3 * BATCH, "the rows of the first three steps, in the second epoch"


def test_the_kept_reference_has_the_entries_of_the_checkpoint_it_came_from(runs):
    folders = [
        [f.name for f in (runs / name).iterdir()] for name in ("shared", "fixed/reference_cache", "empty_cache")
    ]
    assert folders[0] == folders[1] == folders[2]
    assert len(folders[0]) == 1


# --- LoRA, several processes, death


@pytest.fixture(scope="module")
def lora(root):
    words = _changed(WORDS, *LORA)
    cached = _changed(words, CACHE, f"{PLACE}=lora_cache")
    words = [word for word in words if not word.startswith("model.kto.reference_from_path")]
    cached = [word for word in cached if not word.startswith("model.kto.reference_from_path")]
    return _run(
        root,
        "lora",
        [
            ("lora_off", ["train", *words]),
            ("lora_none", ["cache-reference", *cached]),
            ("lora_cached", ["train", *cached]),
        ],
    )


@pytest.mark.slow
def test_lora_with_a_cache_is_lora_without(root, lora):
    assert _lines(root / "lora_off", "training") == _lines(root / "lora_cached", "training")
    assert _lines(root / "lora_off", "validation") == _lines(root / "lora_cached", "validation")
    assert _computed(root / "lora_cached") == [0] * 6
    rows = 2 * ROWS + 2 * HELDOUT
    assert f"samples and pairs of 5 steps (1 epochs), and the validation data: {rows} rows\n" in lora["lora_none"]
    assert f"0 were there, {rows} computed in " in lora["lora_none"]
    assert f"s, {32 * rows} bytes written to lora_cache\n" in lora["lora_none"]


def _numbers(printed: str) -> tuple[int, int]:
    """Rows that were there, and rows computed."""
    found = re.search(r"^(\d+) were there, (\d+) computed in", printed, re.MULTILINE)
    return int(found[1]), int(found[2])


def _command(root: Path, *words: str, torchrun: bool = False) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "nemo_kto.cli.main", "cache-reference", *_changed(WORDS, *words)],
        cwd=root,
        env=env | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, f"{out}\n{err}"
    return out


@pytest.mark.slow
def test_layouts_fill_one_cache(root):
    """Two data-parallel ranks of its own, two pipeline stages of torchrun, one process: the last two score nothing."""
    place = f"{PLACE}=layouts"
    first = _numbers(_finish(_command(root, place, "trainer.devices=2")))
    assert min(first) > 0, "samples come twice, and pairs do not"
    second = _finish(_command(root, place, "model.pipeline_model_parallel_size=2", torchrun=True))
    assert _numbers(second) == (sum(first), 0)
    assert _numbers(_finish(_command(root, place))) == (sum(first), 0)
    (folder,) = (root / "layouts").iterdir()
    assert len(list(folder.glob("*.logps"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 4)])
def test_a_command_that_is_killed_or_stopped_goes_on(root, number, code):
    """While it scores: what it had scored is there, and nothing of it is scored again."""
    tiny.make_records(root / "many.jsonl", 400, seed=3)
    place = f"ended{code}"
    words = (f"{PLACE}={place}", "model.data.data_prefix.train=[many.jsonl]", "trainer.kto.max_epochs=1")
    process = _command(root, *words)
    while process.poll() is None and not any(f.stat().st_size > 1000 for f in root.glob(f"{place}/*/*.logps")):
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code, f"it was done before it could be ended\n{err}"
    assert code < 0 or "stopped by SIGTERM after" in err
    (file,) = root.glob(f"{place}/*/*.logps")
    left = (file.stat().st_size - 64) // 32
    total = 2 * 400 + 2 * HELDOUT
    assert 0 < left < total
    assert _numbers(_finish(_command(root, *words))) == (left, total - left)


def test_a_place_that_cannot_be_written_is_an_error_of_this_command(root):
    """A training would go on without writing."""
    (root / "a_file").write_text("")
    process = _command(root, f"{PLACE}=a_file/cache")
    _, err = process.communicate(timeout=400)
    assert process.returncode == 3, err
    assert "a_file/cache/" in err
    assert "cannot be written (Not a directory): point model.kto.reference_cache_dir elsewhere" in err


def test_entries_are_float64(runs):
    """Some number of nats is no float32: sums are kept as they are computed."""
    (folder,) = (runs / "shared").iterdir()
    data = b"".join(f.read_bytes()[64:] for f in folder.glob("*.logps"))
    logps = np.frombuffer(data, [("key", "V16"), ("logp", "<f8"), ("rest", "V8")])["logp"]
    assert (logps != logps.astype(np.float32)).any()
    assert (logps < 0).all()
