"""Runs many command lines one after the other in one process, because importing NeMo takes longer than all of them.

The program of :func:`run`: reads them from a file, and writes exit codes and standard errors to another.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Done:
    """How a command ended: exit code and standard error."""

    code: int
    text: str


def run(here: Path, commands: Mapping[str, tuple[Sequence[str], Mapping[str, str]]], without: Sequence[str]) -> dict:
    """Run ``nemo-kto`` in ``here`` for each (arguments, environment); results by name.

    Args:
        here: working directory.
        commands: what to run.
        without: environment variables to take away.
    """
    file, results = here / "session.json", here / "session.results.json"
    file.write_text(json.dumps({name: [list(words), dict(env)] for name, (words, env) in commands.items()}))
    env = {key: value for key, value in os.environ.items() if key not in without} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(file), str(results)],
        cwd=here,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: Done(**found) for name, found in json.loads(results.read_text()).items()}


def _one(words: list[str], environment: dict[str, str]) -> Done:
    from nemo_kto.cli.main import main

    before, said = dict(os.environ), io.StringIO()
    os.environ.update(environment)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
    except SystemExit as usage:
        code = usage.code
    except Exception:
        code = 1
        said.write(traceback.format_exc())
    finally:
        os.environ.clear()
        os.environ.update(before)
    from nemo_kto.launch import shutdown

    shutdown()
    return Done(code, said.getvalue())


def _forked(words: list[str], environment: dict[str, str]) -> Done:
    """In a copy of this process: one that has met others, or waited for them, does not forget it."""
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if not child:
            try:
                file.write(json.dumps(asdict(_one(words, environment))))
                file.flush()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        file.seek(0)
        return Done(**json.load(file))


def _main(file: str, results: str) -> None:
    commands = json.loads(Path(file).read_text())
    found = {
        name: asdict((_forked if "WORLD_SIZE" in environment else _one)(words, environment))
        for name, (words, environment) in commands.items()
    }
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
