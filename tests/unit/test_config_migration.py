"""A config in NeMo-Aligner's manner runs after exactly the edits that the messages ask for."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_kto.config.checks import check_schedule
from nemo_kto.config.load import load_config, schema_keys
from nemo_kto.config.migration import _ADVICE, advice_for
from nemo_kto.errors import ConfigError

ALIGNER: dict[str, Any] = {
    "defaults": [{"optional tp_overlap@model.ub_tp_comm_overlap_cfg": None}],
    "trainer": {
        "num_nodes": 2,
        "devices": 8,
        "accelerator": "gpu",
        "precision": "bf16",
        "gradient_clip_val": 0.0,
        "kto": {
            "max_epochs": 3,
            "max_steps": 500,
            "val_check_interval": 0.2,
            "save_interval": 50,
            "limit_train_batches": 1.0,
            "limit_val_batches": 8,
            "gradient_clip_val": 0.7,
        },
        "logger": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "max_time": "00:03:50:00",
        "max_epochs": "${.kto.max_epochs}",
        "max_steps": "${.kto.max_steps}",
    },
    "exp_manager": {
        "explicit_log_dir": "results/aligner",
        "exp_dir": None,
        "name": "aligner_run",
        "max_time_per_run": "${trainer.max_time}",
        "create_wandb_logger": False,
        "wandb_logger_kwargs": {"project": "align", "name": "one"},
        "resume_from_checkpoint": None,
        "resume_if_exists": True,
        "resume_ignore_no_checkpoint": True,
        "create_checkpoint_callback": True,
        "checkpoint_callback_params": {
            "monitor": "val_loss",
            "save_top_k": 2,
            "mode": "min",
            "always_save_nemo": False,
            "save_nemo_on_train_end": True,
            "filename": "run--{${.monitor}:.3f}-{step}",
            "model_parallel_size": "${multiply:${model.tensor_model_parallel_size},2}",
        },
    },
    "pretrained_checkpoint": {"restore_from_path": None},
    "model": {
        "mcore_gpt": True,
        "megatron_amp_O2": True,
        "micro_batch_size": 2,
        "global_batch_size": 128,
        "tensor_model_parallel_size": 4,
        "pipeline_model_parallel_size": 2,
        "encoder_seq_length": 4096,
        "max_position_embeddings": "${model.encoder_seq_length}",
        "seed": 99,
        "kto": {
            "log_prob_forward_micro_batch_size": "${multiply:${model.micro_batch_size},2}",
            "ref_policy_kl_penalty": 0.05,
            "desirable_loss_weight": 1.0,
            "undesirable_loss_weight": 1.2,
            "preference_average_log_probs": False,
            "sft_average_log_probs": "${.preference_average_log_probs}",
            "preference_loss_weight": 1,
            "sft_loss_weight": 0,
        },
        "peft": {
            "peft_scheme": "none",
            "restore_from_path": None,
            "restore_from_ckpt": {"checkpoint_dir": None, "checkpoint_name": None},
            "lora_tuning": {"target_modules": ["attention_qkv"], "adapter_dim": 32, "adapter_dropout": 0.0},
        },
        "optim": {
            "name": "distributed_fused_adam",
            "bucket_cap_mb": 200,
            "overlap_grad_sync": False,
            "overlap_param_gather": False,
            "contiguous_grad_buffer": True,
            "lr": 9e-7,
            "weight_decay": 0.05,
            "betas": [0.9, 0.95],
            "sched": {"name": "CosineAnnealing", "warmup_steps": 20, "constant_steps": 1000, "min_lr": 9e-8},
        },
        "data": {
            "data_impl": "jsonl",
            "splits_string": None,
            "seq_length": "${model.encoder_seq_length}",
            "skip_warmup": True,
            "num_workers": 0,
            "dataloader_type": "single",
            "reset_position_ids": False,
            "reset_attention_mask": False,
            "eod_mask_loss": False,
            "index_mapping_dir": None,
            "data_prefix": None,
        },
        "overwrite_base_config": {"data": {"data_prefix": True}},
    },
    "precision": "${trainer.precision}",
}
OWNERS = {
    "pretrained_checkpoint.restore_from_path": "/models/base",
    "model.data.data_prefix": {"train": ["train.jsonl"], "validation": ["valid.jsonl"]},
    "model.kto.log_prob_forward_micro_batch_size": 4,
}
"""Values that only the owner can know, given when a message asks for them."""


def take(tree: dict[str, Any], key: str) -> Any:
    """Remove a key, and groups that become empty."""
    *groups, leaf = key.split(".")
    node = tree
    for group in groups:
        node = node[group]
    value = node.pop(leaf)
    if groups and not node:
        take(tree, ".".join(groups))
    return value


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    *groups, leaf = key.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[leaf] = value


def current(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None  # type: ignore[assignment]
    return tree


def obey(tree: dict[str, Any], line: str) -> None:
    """Do what one line of a message says, and nothing else. "use" keeps what stands there as a value already."""
    unknown = re.match(r"unknown config key (\S+): (?:remove it|use (\S+))", line)
    named = re.match(
        r"(?:config key )?([\w.]+)(?:: .*write the value itself| is not set| is a group of settings)", line
    )
    if unknown is not None:
        value, there = take(tree, unknown[1]), unknown[2]
        if there is not None and (current(tree, there) is None or "${" in str(current(tree, there))):
            put(tree, there, value)
    elif "begin it with `defaults:" in line:
        tree["defaults"] = yaml.safe_load(re.search(r"`defaults: (.*)`", line)[1])  # type: ignore[index]
    elif named is not None:
        put(tree, named[1], OWNERS[named[1]])
    else:
        pytest.fail(f"this line asks for no edit: {line}")


def migrate(tree: dict[str, Any], folder: Path, rounds: int = 6):
    """Load, obey the message, and try again."""
    for _ in range(rounds):
        (folder / "mine.yaml").write_text(yaml.safe_dump(tree))
        try:
            return load_config([], config_dir=folder, config_name="mine")
        except ConfigError as refused:
            for line in str(refused).splitlines():
                obey(tree, line)
    pytest.fail(f"still refused after {rounds} rounds of edits")


def test_the_messages_lead_all_the_way(tmp_path):
    config = migrate(copy.deepcopy(ALIGNER), tmp_path)
    kto, optim = config.model.kto, config.model.optim
    assert (kto.kl_clamp, kto.loss_normalization, kto.loss_type) == ("batch_mean", "per_batch", "kto")
    assert (kto.ref_policy_kl_penalty, kto.undesirable_loss_weight) == (0.05, 1.2)
    assert (config.trainer.kto.max_epochs, config.trainer.kto.max_steps) == (3, 500)
    assert config.trainer.kto.gradient_clip_val == 0.7
    assert config.exp_manager.max_time_per_run == "00:03:50:00"
    assert config.exp_manager.explicit_log_dir == "results/aligner"
    assert (config.model.data.seq_length, config.model.seed) == (4096, 99)
    assert config.model.data.data_prefix.validation == ["valid.jsonl"]
    assert (optim.lr, optim.betas, optim.sched.warmup_steps) == (9e-7, [0.9, 0.95], 20)
    # Its 1000 steps at min_lr are more than this run has: that, too, is said before training.
    with pytest.raises(ConfigError, match=r"constant_steps 1000 leave nothing of the 500 steps"):
        check_schedule(optim, 500)


def test_no_key_that_exists_is_advised_away():
    assert [key for key in schema_keys() if advice_for(key) is not None] == []


def test_every_advice_names_keys_that_exist():
    known = set(schema_keys())
    groups = {key.rsplit(".", depth)[0] for key in known for depth in (1, 2, 3)}
    for key, advice in _ADVICE.items():
        assert key not in known
        for named in re.findall(r"\b(?:trainer|exp_manager|model)(?:\.\w+)+", advice):
            assert named in known | groups, f"{key}: {advice}"
        assert re.match(r"remove it|use [\w.]+", advice), advice


@pytest.mark.parametrize("key", ["trainer.logger", "model.overwrite_base_config.data.data_prefix", "precision"])
def test_advice_covers_what_lies_below(key):
    assert advice_for(key) == advice_for(f"{key}.deeper")


def test_other_keys_have_no_advice():
    assert advice_for("model.kto.beta") is None
    assert advice_for("trainer") is None
