"""Composing a config: keys, groups, types, a user's own yaml, and the way from NeMo-Aligner's."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_kto.config.load import conf_dir, load_config, schema_keys, to_container, to_yaml
from nemo_kto.config.schema import Config
from nemo_kto.errors import ConfigError

GIVEN = ["pretrained_checkpoint.restore_from_path=/models/m", "model.data.data_prefix.train=[a.jsonl]"]


def error(*overrides: str, **where: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config([*GIVEN, *overrides], **where)
    return str(refused.value)


# --- what loads


def test_defaults():
    config = load_config(GIVEN)
    assert config.model.data.data_prefix.train == ["a.jsonl"]
    assert config.model.data.data_prefix.validation is None
    assert config.model.kto.reference_from_path == "/models/m"
    assert (config.model.kto.kl_clamp, config.model.kto.loss_normalization) == ("per_sample", "per_class")
    assert config.model.optim.sched.constant_steps == 0
    assert (config.trainer.devices, config.trainer.num_nodes) == (None, None)


def test_the_shipped_tree_has_every_key_of_the_schema_and_no_other():
    from omegaconf import OmegaConf

    def leaves(node: dict[str, Any], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for key, value in node.items():
            path = f"{prefix}{key}"
            deeper = isinstance(value, dict) and path not in schema_keys()
            found |= leaves(value, f"{path}.") if deeper else {path}
        return found

    shipped = yaml.safe_load((conf_dir() / "gpt_kto.yaml").read_text())
    shipped.pop("defaults")
    loss = {f"model.kto.{key}" for key in yaml.safe_load((conf_dir() / "loss" / "kto.yaml").read_text())}
    assert leaves(shipped) | loss == set(schema_keys())
    assert leaves(OmegaConf.to_container(to_container(load_config(GIVEN)))) == set(schema_keys())


def test_every_key_is_explained_where_it_stands():
    for line in (conf_dir() / "gpt_kto.yaml").read_text().splitlines():
        stripped = line.strip()
        if not stripped.startswith(("#", "-")) and stripped and not stripped.endswith(":"):
            key = stripped.split(":")[0]
            assert "#" in line or key in UNEXPLAINED, f"{key} has no comment"


UNEXPLAINED = {"name", "lr", "wandb_logger_kwargs", "resume_ignore_no_checkpoint", "desirable_loss_weight"}
UNEXPLAINED |= {"undesirable_loss_weight", "hidden_dropout", "attention_dropout", "create_checkpoint_callback"}
UNEXPLAINED |= {"create_tensorboard_logger", "preference_loss_weight"}
"""Keys whose names say it all, or whose neighbour's comment does."""


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("kto", ("per_sample", "per_class", "kto")),
        ("kto_paper", ("batch_mean", "per_batch", "kto")),
        ("apo_zero_unpaired", ("batch_mean", "per_batch", "apo_zero_unpaired")),
    ],
)
def test_loss_presets(loss, expected):
    kto = load_config([*GIVEN, f"loss={loss}"]).model.kto
    assert (kto.kl_clamp, kto.loss_normalization, kto.loss_type) == expected


def test_every_group_choice_composes():
    for path in sorted(conf_dir().glob("*/*.yaml")):
        load_config([*GIVEN, f"{path.parent.name}={path.stem}"])


def test_a_key_beats_its_group():
    assert load_config([*GIVEN, "loss=kto_paper", "model.kto.kl_clamp=per_sample"]).model.kto.kl_clamp == "per_sample"
    assert load_config([*GIVEN, "layout=8gpu", "model.micro_batch_size=4"]).model.micro_batch_size == 4


def test_interpolations_follow_their_source():
    kto = load_config([*GIVEN, "model.micro_batch_size=4", "model.kto.preference_average_log_probs=true"]).model.kto
    assert kto.log_prob_forward_micro_batch_size == 4
    assert kto.sft_average_log_probs is True


def test_ints_and_fractions_keep_their_kind():
    loop = load_config([*GIVEN, "trainer.kto.val_check_interval=1", "trainer.kto.limit_val_batches=1.0"]).trainer.kto
    assert type(loop.val_check_interval) is int
    assert type(loop.limit_val_batches) is float


def test_a_config_is_frozen_and_survives_its_yaml(tmp_path):
    config = load_config([*GIVEN, "layout=8gpu", "+exp_manager.wandb_logger_kwargs.tags=[x]"])
    with pytest.raises(FrozenInstanceError):
        config.model.seed = 1  # type: ignore[misc]
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config([], config_dir=tmp_path, config_name="resolved") == config


# --- what is refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.optim.lrr=1", "unknown config key model.optim.lrr: did you mean model.optim.lr?"),
        ("model.optm.lr=1", "did you mean model.optim.lr?"),
        ("+model.kto.kl_penalty=1", "unknown config key model.kto.kl_penalty"),
        ("max_steps=3", "did you mean trainer.kto.max_steps?"),
        ("zzzzz=3", "unknown config key zzzzz: remove it"),
        ("trainer.max_steps=3", "use trainer.kto.max_steps"),
        ("+trainer.max_steps=3", "use trainer.kto.max_steps"),
        ("++model.data.data_prefix={train: [a], test: [b]}", "model.data.data_prefix.test: remove it"),
        ("model.optim=adam", "config key model.optim is a group of settings, not a value"),
        ("layout=null", "layout=null: leave it out, or take away with '~layout' what your own yaml has chosen"),
        ("model.data.cache_dir=/a=b", """a value that holds =, ~ or brackets once more for Hydra: 'key="/a=b"'"""),
        ("model=null", "config key model is a group of settings, not a value"),
        ("model.data.data_prefix=[a]", "config key model.data.data_prefix is a group of settings"),
        ("exp_manager.wandb_logger_kwargs.tags=1", "add it by +exp_manager.wandb_logger_kwargs.tags="),
        ("loss=ktoo", "Could not find 'loss/ktoo' Available options in 'loss': apo_zero_unpaired kto kto_paper"),
        ("~model.optim.lr", "model.optim.lr: a key of the shipped config cannot be removed"),
        ("hydra.run.dir=x", "hydra.run.dir=x: Hydra's own settings do nothing here"),
        ("model.optim.lr", "'model.optim.lr' is not key=value"),
        ("model.optim.betas=[1", "'model.optim.betas=[1' is not key=value; quote brackets"),
        ("model.optim.lr=fast", "model.optim.lr: Value 'fast' of type 'str' could not be converted to Float"),
        ("model.optim.lr=null", "model.optim.lr: Incompatible value 'None'"),
        ("model.micro_batch_size=1.5", "model.micro_batch_size: Value '1.5'"),
        ("trainer.kto.val_check_interval=often", "trainer.kto.val_check_interval: Value 'often'"),
        ("model.kto.sft_average_log_probs=maybe", "model.kto.sft_average_log_probs: Value 'maybe'"),
        ("model.optim.betas=[a,b]", "model.optim.betas[0]: Value 'a'"),
        ("model.data.data_prefix.train=a.jsonl", "model.data.data_prefix.train must be a list"),
        ("model.data.data_prefix.train=null", "model.data.data_prefix.train is not set: give a list of .jsonl"),
        ("model.optim.lr=${model.nothing}", "model.optim.lr: Interpolation key 'model.nothing' not found"),
        ("model.optim.lr=${model.optim.lr}", "model.optim.lr: Recursive interpolation"),
        (
            "model.optim.lr='${no_such:2,3}'",
            "model.optim.lr: Unsupported interpolation type no_such; write",
        ),
        ("model.seed='${oc.env:NOT_THERE}'", "model.seed: KeyError raised while resolving interpolation"),
    ],
)
def test_refusals_name_the_key_and_the_fix(override, message):
    text = error(override)
    assert message in text
    assert len(text.splitlines()) == 1
    assert "searchpath" not in text.lower()


def test_missing_mandatory_keys_are_listed_together():
    with pytest.raises(ConfigError) as refused:
        load_config([])
    first, second = str(refused.value).splitlines()
    assert (
        first
        == "pretrained_checkpoint.restore_from_path is not set: give a Hugging Face directory or a Megatron checkpoint"
    )
    assert second == "model.data.data_prefix.train is not set: give a list of .jsonl, .jsonl.gz or .parquet files"


# --- a yaml of one's own


def write(folder: Path, text: str, name: str = "mine.yaml") -> dict[str, Any]:
    (folder / name).write_text(text)
    return {"config_dir": folder, "config_name": name.removesuffix(".yaml")}


def test_own_yaml_builds_on_the_shipped_one(tmp_path):
    text = """
defaults: [gpt_kto, {override loss: kto_paper}, {override layout: 8gpu}, _self_]
model: {seed: 7, data: {data_prefix: {train: [mine.jsonl]}}}
pretrained_checkpoint: {restore_from_path: /models/mine}
"""
    where = write(tmp_path, text)
    config = load_config(["model.optim.lr=1e-7"], **where)
    assert (config.model.seed, config.model.optim.lr, config.model.kto.kl_clamp) == (7, 1e-7, "batch_mean")
    assert config.model.tensor_model_parallel_size == 4
    assert load_config(["model.optim.lr=1e-7"], config_dir=tmp_path, config_name="mine.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {seed: 7}", "mine lacks"),
        ("model: {seed: [", "config: while parsing"),
        ("defaults: [gpt_kto, _self_]\nmodel: {sede: 7}", "unknown config key model.sede: did you mean model.seed?"),
        ("defaults: [gpt_kto, _self_]\nmodel: {optim: null}", "config key model.optim is a group of settings"),
        ("defaults: [gtp_kto, _self_]", "gtp_kto"),
        ("defaults: [gpt_kto, {override loss: kot}, _self_]", "loss/kot"),
        ("- a\n- b", "mine"),
    ],
)
def test_own_yaml_errors(tmp_path, text, message):
    with pytest.raises(ConfigError) as refused:
        load_config([], **write(tmp_path, text))
    assert message in str(refused.value)


def test_own_yaml_that_is_not_there_or_hides_the_shipped_one(tmp_path):
    assert "holds no other.yaml" in error(config_dir=tmp_path, config_name="other")
    assert "has the name of the shipped config" in error(**write(tmp_path, "defaults: []", "gpt_kto.yaml"))


def test_loading_twice_in_one_process_is_the_same():
    assert load_config(GIVEN) == load_config(GIVEN)
    assert isinstance(load_config(GIVEN), Config)
