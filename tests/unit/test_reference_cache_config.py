"""``model.kto.reference: cache`` in a config: what is refused, where log-probs go, and what scores them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_kto.config.checks import check
from nemo_kto.config.load import load_config
from nemo_kto.config.lora import reference_mode
from nemo_kto.config.reference_cache import is_cached, with_cache
from nemo_kto.errors import ConfigError

HERE = str(Path(__file__).parent)
GIVEN = [f"pretrained_checkpoint.restore_from_path={HERE}", "model.data.data_prefix.train=[a.jsonl]"]
CACHE, PLACE, PAIRS = "model.kto.reference=cache", "model.kto.reference_cache_dir", "model.kto.fixed_pairs=true"
LORA = "model.peft.peft_scheme=lora"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{PLACE}=x"], f"{PLACE}=x is of {CACHE}: set that, or leave the directory out"),
        ([CACHE, f"{PLACE}=''"], f"{PLACE} is empty: name a directory, or leave it out"),
        ([CACHE, f"{PLACE}={__file__}"], f"{PLACE}={__file__} is a file: name a directory"),
        ([PAIRS, "loss=apo_zero_unpaired"], f"{PAIRS}: model.kto.loss_type=apo_zero_unpaired uses no pairs, set it"),
    ],
)
def test_what_cannot_be_is_refused_with_the_fix(overrides, message):
    with pytest.raises(ConfigError) as refused:
        check(load_config([*GIVEN, *overrides]), 1)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [CACHE],
        [CACHE, f"{PLACE}=x", PAIRS],
        [PAIRS],
        [PAIRS, "exp_manager.explicit_log_dir=results"],
        [CACHE, LORA],
        [CACHE, "model.kto.reference_lookahead=4"],
    ],
)
def test_what_can_be_is_not(overrides):
    check(load_config([*GIVEN, *overrides]), 1)


def test_log_probs_go_beside_the_results_unless_told_otherwise():
    config = load_config([*GIVEN, CACHE, "exp_manager.explicit_log_dir=results"])
    assert config.model.kto.reference_cache_dir == "results/reference_cache"


@pytest.mark.parametrize(("overrides", "mode"), [([CACHE], "swap"), ([CACHE, LORA], "adapters_off")])
def test_what_scores_is_what_auto_chooses(overrides, mode):
    model = load_config([*GIVEN, *overrides]).model
    assert is_cached(model.kto)
    assert reference_mode(model) == mode


def test_a_verb_switches_it_on():
    assert is_cached(with_cache(load_config(GIVEN)).model.kto)
    assert with_cache(load_config([*GIVEN, CACHE])) == load_config([*GIVEN, CACHE])
    with pytest.raises(ConfigError, match=r"model\.kto\.reference=swap keeps no log-probs: leave it out here"):
        with_cache(load_config([*GIVEN, "model.kto.reference=swap"]))
