"""``model.kto.reference: cache`` as a run asks for it: what is wrong with it, and how a verb switches it on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from nemo_kto.config.schema import Config, KTOConfig
from nemo_kto.errors import ConfigError

_KEY = "model.kto.reference_cache_dir"
_SUBDIR = "reference_cache"  # as conf/gpt_kto.yaml has it


def is_cached(kto: KTOConfig) -> bool:
    """Whether log-probs of the reference are kept."""
    return kto.reference == "cache"


def problems(config: Config) -> Iterator[str]:
    """What is wrong with the cache and the pairs that suit it, one line each."""
    kto = config.model.kto
    if kto.fixed_pairs and kto.loss_type == "apo_zero_unpaired":
        yield "model.kto.fixed_pairs=true: model.kto.loss_type=apo_zero_unpaired uses no pairs, set it to false"
    place, default = kto.reference_cache_dir, f"{config.exp_manager.explicit_log_dir}/{_SUBDIR}"
    if not is_cached(kto):
        if place != default:
            yield f"{_KEY}={place} is of model.kto.reference=cache: set that, or leave the directory out"
    elif not place:
        yield f"{_KEY} is empty: name a directory, or leave it out"
    elif Path(place).exists() and not Path(place).is_dir():
        yield f"{_KEY}={place} is a file: name a directory"


def with_cache(config: Config) -> Config:
    """The run with its cache switched on, for a verb that fills it.

    Raises:
        ConfigError: it asks for another kind of reference.
    """
    kto = config.model.kto
    if kto.reference not in ("auto", "cache"):
        raise ConfigError(
            f"model.kto.reference={kto.reference} keeps no log-probs: leave it out here, and train with cache"
        )
    return replace(config, model=replace(config.model, kto=replace(kto, reference="cache")))
