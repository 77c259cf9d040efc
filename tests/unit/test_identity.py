"""What a resumed run must have in common with the one before, and how the difference is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from data_kit import char_tokenizer, data_config, pair, write_jsonl

from nemo_kto.config import manifest
from nemo_kto.config.architecture import Architecture, RopeScaling
from nemo_kto.config.identity import FileDigests, differences, identity
from nemo_kto.config.load import load_config
from nemo_kto.config.resume import RECORD, check_resume
from nemo_kto.config.schema import KTOConfig
from nemo_kto.data.tokenize import build_store
from nemo_kto.errors import ConfigError

DIGESTS = FileDigests((("a.jsonl", "1a"), ("b.jsonl", "2b")), (("config.json", "0"), ("tokenizer.json", "3c")))
NETWORK = Architecture("llama", 4, 64, 128, 4, 2, 16, 399, 256, 1e-5, 1e4, None, False, False, False)
GIVEN = ["pretrained_checkpoint.restore_from_path=model", "model.data.data_prefix.train=[a.jsonl,b.jsonl]"]
DATA, CHANGES = "model.data.data_prefix.train", "exp_manager.resume_with_changes=true"


def of(*words, digests=DIGESTS, network=NETWORK):
    """As it comes back from run.json."""
    return json.loads(json.dumps(identity(load_config([*GIVEN, *words]), digests, network)))


MATTERS = {
    "model.global_batch_size=8": "model.global_batch_size was 64, now 8",
    "model.seed=1": "model.seed was 1234, now 1",
    "model.data.seq_length=99": "model.data.seq_length was 1024, now 99",
    "model.data.shuffle=false": "model.data.shuffle was true, now false",
    "model.data.append_eos=false": "model.data.append_eos was true, now false",
    "model.data.overlong=truncate": "model.data.overlong was drop, now truncate",
    "trainer.kto.limit_train_batches=1": "trainer.kto.limit_train_batches was 1.0, now 1",
    "trainer.kto.limit_train_batches=0.5": "trainer.kto.limit_train_batches was 1.0, now 0.5",
    "model.kto.ref_policy_kl_penalty=0.1": "model.kto.ref_policy_kl_penalty was 0.2, now 0.1",
    "model.kto.desirable_loss_weight=2": "model.kto.desirable_loss_weight was 1.0, now 2.0",
    "model.kto.undesirable_loss_weight=2": "model.kto.undesirable_loss_weight was 1.0, now 2.0",
    "model.kto.sft_average_log_probs=true": "model.kto.sft_average_log_probs was false, now true",
    "model.kto.preference_loss_weight=2": "model.kto.preference_loss_weight was 1.0, now 2.0",
    "model.kto.sft_loss_weight=2": "model.kto.sft_loss_weight was 0.0, now 2.0",
    "model.kto.kl_clamp=batch_mean": "model.kto.kl_clamp was per_sample, now batch_mean",
    "model.kto.loss_normalization=per_batch": "model.kto.loss_normalization was per_class, now per_batch",
    "model.kto.loss_type=apo_zero_unpaired": "model.kto.loss_type was kto, now apo_zero_unpaired",
    "model.kto.fixed_pairs=true": "model.kto.fixed_pairs was false, now true",
}
FREE = [
    "model.micro_batch_size=2",
    "model.kto.log_prob_forward_micro_batch_size=4",
    "model.kto.reference_from_path=elsewhere",
    "model.kto.reference_lookahead=4",
    "model.kto.reference_restore=host",
    "model.kto.reference_cache_dir=elsewhere",
    "model.tensor_model_parallel_size=2",
    "model.pipeline_model_parallel_size=2",
    "model.optim.lr=1",
    "model.optim.name=adamw",
    "trainer.kto.max_steps=7",
    "trainer.kto.max_epochs=7",
    "trainer.kto.limit_val_batches=1",
    "trainer.precision=32",
    "model.data.data_prefix.validation=[v.jsonl]",
    "model.data.num_workers=0",
    "model.data.tokenize_workers=1",
    "model.data.cache_dir=cache",
    "exp_manager.explicit_log_dir=other",
    "pretrained_checkpoint.restore_from_path=copy",
]


@pytest.mark.parametrize("word", MATTERS)
def test_what_decides_on_batches_and_loss_is_compared(word):
    assert differences(of(), of(word)) == [MATTERS[word]]


def test_a_network_that_computes_otherwise_is_another_one():
    scaled = RopeScaling("linear", 2.0)
    changed = differences(of(), of(network=replace(NETWORK, rope_theta=5e5, rope_scaling=scaled)))
    assert changed[0] == "network.rope_theta was 10000.0, now 500000.0"
    assert changed[1].startswith('network.rope_scaling was null, now {"kind": "linear", "factor": 2.0')
    assert len(changed) == 2


def test_every_setting_of_the_loss_is_either_compared_or_said_to_be_free():
    named = {word.split("=")[0].removeprefix("model.kto.") for word in MATTERS if word.startswith("model.kto.")}
    named |= {word.split("=")[0].removeprefix("model.kto.") for word in FREE if word.startswith("model.kto.")}
    named |= {"preference_average_log_probs", "reference"}
    assert named == set(KTOConfig.__dataclass_fields__)


def test_an_interpolated_setting_changes_with_its_source():
    found = differences(of(), of("model.kto.preference_average_log_probs=true"))
    assert [line.split(" ")[0].rsplit(".")[-1] for line in found] == [
        "preference_average_log_probs",
        "sft_average_log_probs",
    ]


@pytest.mark.parametrize("word", FREE)
def test_what_decides_on_neither_is_free(word):
    assert differences(of(), of(word)) == []


A, B, X = ("a.jsonl", "1a"), ("b.jsonl", "2b"), ("x.jsonl", "9x")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([A, B], []),
        ([("moved/a.jsonl", "1a"), B], []),
        ([A, ("b.jsonl", "5e")], ["file 2, b.jsonl, holds other bytes than then"]),
        ([X, B], ["file 1, x.jsonl (then a.jsonl), holds other bytes than then"]),
        ([A, B, X], ["file 3, x.jsonl, is new"]),
        ([A], ["file 2, b.jsonl, is gone"]),
        ([B, A], ["the same files in another order: a.jsonl, b.jsonl, now b.jsonl, a.jsonl"]),
    ],
)
def test_data_files_are_told_apart_by_their_bytes(files, said):
    found = differences(of(), of(digests=FileDigests(tuple(files), DIGESTS.tokenizer)))
    assert found == [f"{DATA}: {line}" for line in said]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([("config.json", "7"), ("tokenizer.json", "3c")], []),
        ([("tokenizer.json", "4d")], ["tokenizer.json holds other bytes than then"]),
        ([("tokenizer.json", "3c"), ("merges.txt", "5")], ["merges.txt is new"]),
        ([("vocab.json", "5")], ["tokenizer.json is gone", "vocab.json is new"]),
    ],
)
def test_tokenizer_files_are_named(files, said):
    found = differences(of(), of(digests=FileDigests(DIGESTS.data, tuple(files))))
    assert found == [f"tokenizer: {line}" for line in said]


def test_a_key_that_only_one_version_knows_is_no_difference():
    saved = of()
    del saved["model.data.overlong"]
    assert differences({**saved, "model.kto.retired": 1}, of("model.data.overlong=error")) == []


def test_the_digests_are_those_of_the_files_bytes(tmp_path):
    data, tokenizer = tmp_path / "data.jsonl", char_tokenizer(tmp_path / "tok")
    write_jsonl(data, [pair("ab", "cd"), pair("x", "yz", False)])
    first = build_store([data], tokenizer, data_config(tmp_path / "cache"))
    again = build_store([data], tokenizer, data_config(tmp_path / "cache"))
    assert first.digests == again.digests, "built or found"
    copy = shutil.copytree(tokenizer, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"weights")
    assert build_store([data], copy, data_config(tmp_path / "cache")).digests == first.digests
    data.write_text(data.read_text().replace("yz", "yy"))
    assert build_store([data], copy, data_config(tmp_path / "cache")).digests.data != first.digests.data
    assert [name for name, _ in first.digests.tokenizer] == sorted(p.name for p in tokenizer.iterdir())


# --- the checkpoint that a run goes on from


@pytest.fixture
def log_dir(tmp_path) -> Path:
    """A run with one checkpoint of step 3."""
    checkpoint(tmp_path / "run", {"identity": of(), "consumed_samples": 192})
    return tmp_path / "run"


def checkpoint(log_dir: Path, record, step: int = 3) -> Path:
    folder = log_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{}")
    if record is not None:
        (folder / RECORD).write_text(record if isinstance(record, str) else json.dumps(record))
        manifest.complete(folder, {})
    return folder


def check(log_dir, *words):
    config = load_config([*GIVEN, f"exp_manager.explicit_log_dir={log_dir}", *words])
    return check_resume(config, identity(config, DIGESTS, NETWORK))


def test_a_run_that_is_the_same_goes_on_in_silence(log_dir):
    assert check(log_dir, "model.optim.lr=1", "trainer.kto.max_steps=9") == []


def test_nothing_is_compared_where_nothing_is_resumed(tmp_path, log_dir):
    assert check(tmp_path / "new", "model.seed=1") == []


def test_differences_are_an_error_that_lists_them(log_dir):
    with pytest.raises(ConfigError) as refused:
        check(log_dir, "model.seed=1", "model.kto.kl_clamp=batch_mean")
    assert str(refused.value).splitlines() == [
        f"{log_dir}/checkpoints/step-000003 is of a run with other settings or files:",
        "  model.seed was 1234, now 1",
        "  model.kto.kl_clamp was per_sample, now batch_mean",
        "put them back, or set exp_manager.resume_with_changes=true to go on with what is given now",
    ]


def test_a_checkpoint_of_another_directory_is_compared_too(tmp_path, log_dir):
    words = [f"exp_manager.resume_from_checkpoint={log_dir}/checkpoints/step-000003", "model.seed=1"]
    with pytest.raises(ConfigError, match=r"model\.seed was 1234"):
        check(tmp_path / "new", *words)
    assert check(tmp_path / "new", *words, CHANGES)


def test_changes_that_are_wanted_are_said(log_dir):
    assert check(log_dir, CHANGES, "model.seed=1", "model.data.shuffle=false") == [
        f"going on from {log_dir}/checkpoints/step-000003 with changes: model.seed was 1234, now 1",
        f"going on from {log_dir}/checkpoints/step-000003 with changes: model.data.shuffle was true, now false",
    ]


@pytest.mark.parametrize("record", [None, {"step": 3}, {"identity": {}}, "{", "[]", '{"identity": 3}'])
def test_a_checkpoint_that_tells_nothing_is_a_warning(tmp_path, record):
    checkpoint(tmp_path, record)
    (note,) = check(tmp_path, "model.seed=1")
    assert "step-000003 does not tell what it was trained on" in note


def test_a_damaged_record_is_replaced_by_another_of_the_run(log_dir):
    checkpoint(log_dir, "{", step=5)
    with pytest.raises(ConfigError, match=r"model\.seed was 1234"):
        check(log_dir, "model.seed=1")


def test_a_record_of_other_bytes_than_were_saved_does_not_count(log_dir):
    """A flipped bit in it must not pass for other settings."""
    newest = checkpoint(log_dir, {"identity": of("model.seed=1")}, step=5)
    text = (newest / RECORD).read_text()
    (newest / RECORD).write_text(text.replace('"model.seed": 1', '"model.seed": 2'))
    assert check(log_dir) == []


def test_a_new_batch_size_needs_a_directory_of_its_own(tmp_path, log_dir):
    start = f"exp_manager.resume_from_checkpoint={log_dir}/checkpoints/step-000003"
    with pytest.raises(ConfigError, match=r"model\.global_batch_size was 64, now 32\n"):
        check(tmp_path / "new", start, "model.global_batch_size=32")
    for words in ([], [start]):
        with pytest.raises(ConfigError, match=r"another exp_manager\.explicit_log_dir"):
            check(log_dir, *words, CHANGES, "model.global_batch_size=32")
    (note,) = check(tmp_path / "new", start, CHANGES, "model.global_batch_size=32")
    assert note.endswith("model.global_batch_size was 64, now 32")
    with pytest.raises(ConfigError, match=r"consumed 192 samples, no multiple of 128: choose a model\.global"):
        check(tmp_path / "new", start, CHANGES, "model.global_batch_size=128")


def test_an_identity_is_plain_json():
    assert of() == identity(load_config(GIVEN), DIGESTS, NETWORK)
