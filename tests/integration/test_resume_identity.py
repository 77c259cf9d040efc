"""A run resumed with other data, tokenizer, seed, batch size or loss is refused before it trains, unless told to."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import tiny
from command_line import read_metrics
from train_runs import train

from nemo_kto.cli.main import main
from nemo_kto.config import manifest
from nemo_kto.config.locate import checkpoint_steps

pytestmark = pytest.mark.integration

TRAIN, CHANGES = "model.data.data_prefix.train", "exp_manager.resume_with_changes"
NEWEST = "run/checkpoints/step-000003"
FROM = f"exp_manager.resume_from_checkpoint={NEWEST}"
WORDS = [
    *("trainer.kto.limit_val_batches=0", "trainer.kto.save_interval=100", "trainer.kto.max_steps=3"),
    *(f"{TRAIN}=[train.jsonl,more.jsonl]", "model.data.tokenize_workers=1", "model.optim.sched.warmup_steps=1"),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory, tiny_llama) -> Path:
    """A run of three steps, and what another run may be given instead of its files."""
    here = tmp_path_factory.mktemp("identity")
    shutil.copytree(tiny_llama, here / "model")
    for seed, name in enumerate(("train", "more", "heldout", "other")):
        tiny.make_records(here / f"{name}.jsonl", 10, seed)
    train(here, "run", *WORDS)
    shutil.copytree(here / "run", here / "apart")
    other = shutil.copytree(here / "model", here / "other_tokenizer") / "tokenizer_config.json"
    other.write_text(other.read_text().replace("<|im_end|>", "<|im_start|>"))
    config = shutil.copytree(here / "model", here / "other_network") / "config.json"
    config.write_text(config.read_text().replace("10000.0", "500000.0"))
    return here


@pytest.fixture
def command_line(here, monkeypatch, capsys):
    """``nemo-kto train`` in this process, to go on from the run: exit code and standard error."""
    monkeypatch.chdir(here)
    before, logger = dict(os.environ), logging.getLogger("nemo_kto")
    state = (logger.handlers[:], logger.propagate, logger.level)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        given = ["pretrained_checkpoint.restore_from_path=model", "exp_manager.explicit_log_dir=run"]
        given += ["model.data.cache_dir=cache", "model.data.seq_length=64", "model.kto.ref_policy_kl_penalty=0.5"]
        given += ["model.global_batch_size=4", *WORDS]
        keys = {word.split("=")[0] for word in words}
        code = main(["train", *[word for word in given if word.split("=")[0] not in keys], *words])
        return code, capsys.readouterr().err

    yield run
    os.environ.clear()
    os.environ.update(before)
    logger.handlers, logger.propagate = state[0], state[1]
    logger.setLevel(state[2])


CASES = {
    "batch size": (["model.global_batch_size=2"], ["model.global_batch_size was 4, now 2"]),
    "seed": (["model.seed=1"], ["model.seed was 1234, now 1"]),
    "loss": (
        ["loss=kto_paper"],
        ["model.kto.kl_clamp was per_sample, now batch_mean", "model.kto.loss_normalization was per_class, now per_"],
    ),
    "beta": (["model.kto.ref_policy_kl_penalty=0.1"], ["model.kto.ref_policy_kl_penalty was 0.5, now 0.1"]),
    "order of rows": (["model.data.shuffle=false"], ["model.data.shuffle was true, now false"]),
    "batches": (["trainer.kto.limit_train_batches=4"], ["trainer.kto.limit_train_batches was 1.0, now 4"]),
    "length of rows": (["model.data.seq_length=60"], ["model.data.seq_length was 64, now 60"]),
    "data file": (
        [f"{TRAIN}=[train.jsonl,other.jsonl]"],
        [f"{TRAIN}: file 2, other.jsonl (then more.jsonl), holds other bytes than then"],
    ),
    "another file": (
        [f"{TRAIN}=[train.jsonl,more.jsonl,other.jsonl]"],
        [f"{TRAIN}: file 3, other.jsonl, is new"],
    ),
    "file lost": ([f"{TRAIN}=[train.jsonl]", "trainer.kto.max_epochs=9"], [f"{TRAIN}: file 2, more.jsonl, is gone"]),
    "order of files": ([f"{TRAIN}=[more.jsonl,train.jsonl]"], [f"{TRAIN}: the same files in another order"]),
    "tokenizer": (
        ["pretrained_checkpoint.restore_from_path=other_tokenizer"],
        ["tokenizer: tokenizer_config.json holds other bytes than then"],
    ),
    "network": (
        ["pretrained_checkpoint.restore_from_path=other_network"],
        ["network.rope_theta was 10000.0, now 500000.0"],
    ),
    "from elsewhere": (
        ["exp_manager.explicit_log_dir=new", FROM, "model.seed=1"],
        ["model.seed was 1234, now 1"],
    ),
    "batch size within the run": (
        [f"{CHANGES}=true", "model.global_batch_size=2"],
        ["model.global_batch_size was 4, now 2: steps would have other numbers", f"{FROM} and another"],
    ),
    "batch size that does not fit": (
        [f"{CHANGES}=true", "model.global_batch_size=5", "exp_manager.explicit_log_dir=new", FROM],
        ["has consumed 12 samples, no multiple of 5: choose a model.global_batch_size that divides it"],
    ),
}


def snapshot(here: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted((here / "run").rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_what_has_changed_is_named_and_nothing_is_touched(name, command_line, here):
    words, fragments = CASES[name]
    before = snapshot(here)
    code, text = command_line(*words)
    assert code == 2, text
    assert text.count("error: ") == 1
    assert "Traceback" not in text
    for fragment in fragments:
        assert fragment in text
    if "was" not in text.split("error: ")[1].splitlines()[0]:
        assert f"error: {NEWEST} is of a run with other settings or files:" in text
        listed = [line for line in text.splitlines() if line.startswith("  ")]
        assert len(listed) == len(fragments), text
        assert "exp_manager.resume_with_changes=true" in text.splitlines()[-1]
    assert snapshot(here) == before
    assert not any((here / "new").rglob("*"))


@pytest.mark.slow
def test_changes_that_are_wanted_train_on_with_a_warning(here):
    """Another batch size too: its steps count what the run has consumed in batches of the new size."""
    words = [*WORDS, FROM, f"{CHANGES}=true", "model.global_batch_size=2", "model.seed=1"]
    run = train(here, "changed", *[word for word in words if "max_steps" not in word], "trainer.kto.max_steps=8")
    warnings = [line for line in run.stderr.splitlines() if "with changes" in line]
    assert warnings == [
        f"warning: going on from {NEWEST} with changes: {line}"
        for line in ("model.global_batch_size was 4, now 2", "model.seed was 1234, now 1")
    ]
    lines = read_metrics(run.out / "metrics.jsonl")
    assert [(line["step"], line["consumed_samples"]) for line in lines] == [(7, 14), (8, 16)]
    # the record is of the run as it is now: it needs no override any more
    assert json.loads((run.out / "checkpoints/step-000008/run.json").read_text())["identity"]["model.seed"] == 1


@pytest.mark.slow
def test_the_optimizer_takes_the_settings_it_is_given_now(here):
    """They are free to change, so a checkpoint must not put its own back. Two ways from one checkpoint."""
    words = [word for word in WORDS if "max_steps" not in word and "save_interval" not in word]
    words += ["trainer.kto.max_steps=5", "trainer.kto.save_interval=100"]
    lines = {}
    for name, betas in (("as_before", "[0.9,0.98]"), ("other_betas", "[0.5,0.6]")):
        shutil.copytree(here / "apart", here / name)
        lines[name] = train(here, name, *words, f"model.optim.betas={betas}").training
    assert lines["as_before"][3] == lines["other_betas"][3], "before the first update after the checkpoint"
    assert lines["as_before"][4]["loss"] != lines["other_betas"][4]["loss"]


@pytest.mark.slow
def test_a_run_that_is_the_same_or_of_an_older_version_goes_on(here):
    """What may change has changed; and a checkpoint that does not tell is a warning."""
    shutil.copytree(here / "run", here / "older")
    ((_, checkpoint),) = checkpoint_steps(here / "older")
    record = json.loads((checkpoint / "run.json").read_text())
    del record["identity"]
    (checkpoint / "run.json").write_text(json.dumps(record))
    manifest.complete(checkpoint, {})
    free = ["model.micro_batch_size=1", "model.optim.lr=1e-4", "trainer.kto.save_interval=1"]
    words = [*[word for word in WORDS if "max_steps" not in word and "save_interval" not in word], *free]
    same = train(here, "run", *words, "trainer.kto.max_steps=4")
    older = train(here, "older", *words, "trainer.kto.max_steps=4", "model.seed=1")
    assert [line["step"] for line in same.training] == [line["step"] for line in older.training] == [1, 2, 3, 4]
    assert "warning: older/checkpoints/step-000003 does not tell what it was trained on" in older.stderr
    assert "warning" not in same.stderr
