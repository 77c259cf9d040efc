"""A run's directory: what is refused before anything is written there, and that two runs never share it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nemo_kto.config.log_dir import CONFIG_HEADER, check_log_dir, claim, write_config
from nemo_kto.errors import ConfigError

HOLD = "import pathlib, sys; from nemo_kto.config import log_dir; log_dir.claim(pathlib.Path(sys.argv[1])); print(1)"
WAIT = "; sys.stdout.flush(); sys.stdin.read()"


def test_a_new_directory_is_made_and_empty(tmp_path):
    check_log_dir(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("name", ["reference/model.safetensors", "config.yaml"])
def test_what_is_not_of_a_run_is_left_alone(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine: 1\n")
    with pytest.raises(ConfigError, match=r"is not of a run: name another directory"):
        check_log_dir(tmp_path)
    assert file.read_text() == "mine: 1\n"


def test_what_a_run_has_left_may_be_replaced(tmp_path):
    write_config(tmp_path, "seed: 1\n")
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "manifest.json").touch()
    check_log_dir(tmp_path)
    write_config(tmp_path, "seed: 2\n")
    assert (tmp_path / "config.yaml").read_text() == f"{CONFIG_HEADER}seed: 2\n"
    assert not list(tmp_path.glob(".*partial"))


def test_a_config_that_cannot_be_written_leaves_the_one_before(tmp_path):
    write_config(tmp_path, "seed: 1\n")
    (tmp_path / ".config.yaml.partial").mkdir()
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be written \(Is a directory\): name another"):
        write_config(tmp_path, "seed: 2\n")
    assert (tmp_path / "config.yaml").read_text() == f"{CONFIG_HEADER}seed: 1\n"


def test_a_directory_belongs_to_one_run_until_it_ends(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD + WAIT, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(ConfigError, match=rf"is in use by another run \(process {other.pid} on "):
            claim(tmp_path)
        other.kill()
        other.wait()
    claim(tmp_path)
    claim(tmp_path)
    after = subprocess.run([sys.executable, "-c", HOLD, tmp_path], capture_output=True, text=True, check=False)
    assert f"in use by another run (process {os.getpid()} on " in after.stderr
