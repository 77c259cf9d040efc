"""Runs commands one after the other in one process, since importing NeMo costs seconds. Used by test_cache_cli.py.

Usage: several_commands.py FILE   FILE is JSON: a list of [DIRECTORY, ARGUMENTS]. A directory "FROM>TO:STEP" is first
copied from a run's, taken back to where that was when STEP had been saved. A line with the directory comes before what
each command prints.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path


def taken_back(where: str) -> str:
    if ">" not in where:
        return where
    source, (target, step) = where.split(">")[0], where.split(">")[1].split(":")
    shutil.copytree(source, target)
    for checkpoint in Path(target, "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > int(step):
            shutil.rmtree(checkpoint)
    return target


if __name__ == "__main__":
    from nemo_kto.cli.main import main

    for where, arguments in json.loads(Path(sys.argv[1]).read_text()):
        out = taken_back(where)
        sys.stdout.write(f"=== {out}\n")
        sys.stdout.flush()
        code = main([*arguments, f"exp_manager.explicit_log_dir={out}"])
        assert code == 0, code
