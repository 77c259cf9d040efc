"""Composes the Hydra tree in ``conf/`` with a user's overrides and merges it, strictly, onto the schema."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_kto.config.migration import advice_for
from nemo_kto.config.schema import Config
from nemo_kto.errors import ConfigError


def conf_dir() -> Path:
    """The shipped Hydra tree: inside an installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "gpt_kto.yaml").is_file():
            return candidate
    raise ConfigError(f"conf/gpt_kto.yaml is missing beside {package}: reinstall nemo_kto")


def load_config(
    overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, config_name: str = "gpt_kto"
) -> Config:
    """Compose, check every key against the schema, convert types, resolve interpolations.

    Args:
        overrides: Hydra overrides, such as ``model.optim.lr=1e-6`` or ``loss=kto_paper``.
        config_dir: directory of a user's own yaml; it may build on the shipped one (``defaults: [gpt_kto, _self_]``).
        config_name: name of the yaml, without ``.yaml``.

    Raises:
        ConfigError: a yaml or override cannot be read, a key is unknown or missing, a value has the wrong type.
    """
    composed = _compose(list(overrides), config_dir, config_name)
    _refuse_unknown_keys(composed)
    _refuse_missing(composed, config_name)
    return to_config(composed)


def to_config(values: DictConfig) -> Config:
    """Type-check a complete tree of settings and resolve its interpolations.

    Raises:
        ConfigError: a value has the wrong type, or an interpolation cannot be resolved.
    """
    schema = _writable(OmegaConf.structured(_blank(Config)))
    try:
        merged = cast(DictConfig, OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        raise ConfigError(_type_error(error)) from error
    _refuse_dangling(merged)
    try:
        OmegaConf.resolve(merged)
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_type_error(error)) from error


def _refuse_dangling(values: DictConfig) -> None:
    """Name every key whose interpolation leads nowhere; OmegaConf's own errors do not."""
    problems = []
    for key in schema_keys():
        try:
            OmegaConf.select(values, key)
        except OmegaConfBaseException as error:
            problems.append(f"{key}: {_first_line(error)}; write the value itself")
    if problems:
        raise ConfigError("\n".join(problems))


def to_container(config: Config) -> DictConfig:
    """Plain OmegaConf values, as NeMo and Lightning store them."""
    return OmegaConf.create(asdict(config))


def _blank(node: type) -> Any:
    """An instance of a schema class whose leaves are all missing: the merge target."""
    hints = get_type_hints(node)
    leaves = {f.name: hints[f.name] for f in fields(node)}
    return node(**{name: _blank(hint) if is_dataclass(hint) else MISSING for name, hint in leaves.items()})  # type: ignore[arg-type]


def _writable(node: DictConfig) -> DictConfig:
    """Lift the read-only flag that OmegaConf takes from frozen dataclasses, so that the merge can fill the tree."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            _writable(child)
    return node


def to_yaml(config: Config) -> str:
    """The resolved config as yaml, to be kept beside a run's results."""
    return OmegaConf.to_yaml(to_container(config))


def _compose(overrides: list[str], config_dir: str | Path | None, config_name: str) -> DictConfig:
    directory, name = conf_dir(), config_name.removesuffix(".yaml")
    idle = [override for override in overrides if override.lstrip("+~").startswith("hydra.")]
    if idle:
        raise ConfigError(f"{idle[0]}: Hydra's own settings do nothing here; use exp_manager.explicit_log_dir")
    if config_dir is not None:
        directory = Path(config_dir).resolve()
        if not (directory / f"{name}.yaml").is_file():
            raise ConfigError(f"--config-dir {config_dir} holds no {name}.yaml (--config-name)")
        if name == "gpt_kto" and directory != conf_dir():
            raise ConfigError(
                f"{directory}/gpt_kto.yaml has the name of the shipped config: rename it, begin it with "
                "`defaults: [gpt_kto, {override loss: kto_paper}, _self_]` and pass --config-name"
            )
        overrides = [*overrides, f"hydra.searchpath=[file://{conf_dir()}]"]
    for override in overrides:
        group, _, choice = override.partition("=")
        if choice == "null" and group.isidentifier() and (conf_dir() / group).is_dir():
            raise ConfigError(f"{override}: leave it out, or take away with '~{group}' what your own yaml has chosen")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(directory), version_base="1.3"):
            composed: DictConfig = compose(name, overrides)
            return composed
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_explain(error)) from error


def _explain(error: Exception) -> str:
    """Hydra's own words without its search path, or for an unknown key the nearest known one."""
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} is not key=value; quote brackets, commas and $ for the shell, and a value that holds "
            """=, ~ or brackets once more for Hydra: 'key="/a=b"', 'key=["/a=b.jsonl"]'"""
        )
    text = " ".join(str(error).split()).split(" Config search path:")[0]
    override = re.search(r"(?:Could not override '|Error merging override )([\w.]+)", text)
    if override is None:
        return f"config: {text}"
    if override[1] in schema_keys():
        return (
            f"{override[1]}: the yaml does not have the group above it: begin it with `defaults: [gpt_kto, "
            "{override loss: kto_paper}, _self_]`, and delete a line that sets the group to null"
        )
    return _unknown(override[1])


def _refuse_unknown_keys(composed: DictConfig) -> None:
    known = set(schema_keys())
    unknown = [key for key in _leaf_paths(composed, known) if key not in known]
    if unknown:
        raise ConfigError("\n".join(_unknown(key) for key in unknown))


def _leaf_paths(node: DictConfig, known: set[str], prefix: str = "") -> Iterator[str]:
    """Dotted paths of values; a mapping under a schema leaf (free-form settings) counts as one value."""
    for key in node:
        path = f"{prefix}{key!s}"
        child = node._get_node(key)
        if path not in known and isinstance(child, DictConfig) and not child._is_none() and len(child):
            yield from _leaf_paths(child, known, f"{path}.")
        else:
            yield path


def schema_keys(node: type = Config, prefix: str = "") -> list[str]:
    """Every key of the schema, dotted, leaves only."""
    hints = get_type_hints(node)
    keys: list[str] = []
    for field in fields(node):
        hint = hints[field.name]
        path = f"{prefix}{field.name}"
        keys += schema_keys(hint, f"{path}.") if is_dataclass(hint) else [path]  # type: ignore[arg-type]
    return keys


def _unknown(key: str) -> str:
    known = schema_keys()
    advice = advice_for(key)
    if advice:
        return f"unknown config key {key}: {advice}"
    if any(key.startswith(f"{other}.") for other in known):
        return f"{key} is not there yet: add it by +{key}=..."
    groups = {".".join(k.split(".")[:i]) for k in known for i in range(1, k.count(".") + 1)}
    if key in groups:
        return f"config key {key} is a group of settings, not a value"
    by_name = {k.rsplit(".", 1)[-1]: k for k in known}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near = near or [by_name[n] for n in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_name, n=1, cutoff=0.75)]
    return f"unknown config key {key}" + (f": did you mean {near[0]}?" if near else ": remove it")


_MANDATORY = {
    "pretrained_checkpoint.restore_from_path": "a Hugging Face directory or a Megatron checkpoint",
    "model.data.data_prefix.train": "a list of .jsonl, .jsonl.gz or .parquet files",
}


def _refuse_missing(composed: DictConfig, config_name: str) -> None:
    missing = [key for key in schema_keys() if _is_absent(composed, key)]
    foreign = [key for key in missing if key not in _MANDATORY]
    if foreign and config_name == "gpt_kto":
        raise ConfigError(f"{', '.join(foreign)}: a key of the shipped config cannot be removed, only set")
    if foreign:
        raise ConfigError(
            f"{config_name} lacks {len(foreign)} keys, {foreign[0]} among them: begin it with "
            "`defaults: [gpt_kto, {override loss: kto_paper}, _self_]` to take the rest"
        )
    if missing:
        raise ConfigError("\n".join(f"{key} is not set: give {_MANDATORY[key]}" for key in missing))


def _is_absent(composed: DictConfig, key: str) -> bool:
    node: Any = composed
    for part in key.split("."):
        if not isinstance(node, DictConfig) or node._is_none() or part not in node.keys():  # noqa: SIM118
            return True
        node = node._get_node(part)
    return bool(node._is_missing()) or (key in _MANDATORY and bool(node._is_none()))


def _type_error(error: OmegaConfBaseException) -> str:
    key, text = getattr(error, "full_key", None), _first_line(error)
    if "is not a ListConfig" in text:
        return f"{key} must be a list, such as {key}=[first,second]"
    return f"{key}: {text}" if key else text


def _first_line(error: OmegaConfBaseException) -> str:
    return str(error).splitlines()[0]
