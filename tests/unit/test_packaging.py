"""The configuration tree against its schema, and what an installed package holds."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
from omegaconf import DictConfig, OmegaConf

from nemo_kto.config.checks import check
from nemo_kto.config.load import load_config
from nemo_kto.config.schema import Config

ROOT = Path(__file__).resolve().parent.parent.parent


def schema_keys(node: type = Config, prefix: str = "") -> set[str]:
    hints = get_type_hints(node)
    keys: set[str] = set()
    for name in (field.name for field in dataclasses.fields(node)):
        nested = dataclasses.is_dataclass(hints[name])
        keys |= schema_keys(hints[name], f"{prefix}{name}.") if nested else {prefix + name}
    return keys


def yaml_keys(path: Path) -> set[str]:
    """Dotted leaf keys of a conf file, at the place where its ``@package`` puts them."""
    package = re.search(r"# @package (\S+)", path.read_text(encoding="utf-8"))
    prefix = f"{package[1]}." if package and package[1] != "_global_" else ""
    known = schema_keys()

    def walk(node: DictConfig, at: str) -> Iterator[str]:
        for key in node:
            child = None if OmegaConf.is_missing(node, key) else node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and f"{at}{key}" not in known:
                yield from walk(child, f"{at}{key}.")
            else:
                yield f"{at}{key}"

    return {key for key in walk(OmegaConf.load(path), prefix) if key.split(".")[0] != "defaults"}


GROUP_FILES = sorted((ROOT / "conf").glob("*/*.yaml"))


def test_conf_and_schema_hold_the_same_keys():
    assert yaml_keys(ROOT / "conf/gpt_kto.yaml") | yaml_keys(ROOT / "conf/loss/kto.yaml") == schema_keys()


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_groups_set_known_keys_and_say_what_they_are_for(path):
    assert yaml_keys(path) <= schema_keys()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# @package ")
    assert lines[1].startswith("# ")


@pytest.mark.parametrize(("layout", "world_size"), [("laptop", 1), ("1gpu", 1), ("8gpu", 8), ("32gpu", 32)])
def test_layouts_fit_the_machines_they_are_for(layout, world_size, tmp_path):
    overrides = [f"layout={layout}", f"pretrained_checkpoint.restore_from_path={tmp_path}"]
    check(load_config([*overrides, "model.data.data_prefix.train=[train.jsonl]"]), world_size)


def test_loss_presets_set_the_same_keys():
    assert len({frozenset(yaml_keys(path)) for path in (ROOT / "conf/loss").glob("*.yaml")}) == 1


def test_every_key_of_the_main_config_is_explained():
    """A value's line carries a comment."""
    bare = []
    lines = (ROOT / "conf/gpt_kto.yaml").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if re.match(r"\s*[\w]+:\s*[^\s#]", line) and "#" not in line:
            bare.append(f"conf/gpt_kto.yaml:{number}: {line.strip()}")
    assert not bare, "\n".join(bare)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The built wheel, unpacked."""
    out = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        archive.extractall(out / "site")
    return out / "site"


def test_the_wheel_holds_package_and_conf_and_nothing_else(wheel):
    files = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "nemo_kto").rglob("*.py")}
    conf = {f"nemo_kto/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    metadata = {name for name in files if ".dist-info/" in name}
    assert files - metadata == modules | conf | {"nemo_kto/py.typed"}


def test_conf_is_found_from_the_wheel(wheel):
    code = (
        "import nemo_kto, pathlib; from nemo_kto.config.load import conf_dir\n"
        "assert pathlib.Path(nemo_kto.__file__).is_relative_to(pathlib.Path.cwd()); print(conf_dir())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=wheel, check=True, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == wheel / "nemo_kto" / "conf"
