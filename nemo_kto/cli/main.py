"""Entry point of ``nemo-kto``: picks the verb, loads its module only then, and turns errors into exit codes.

A verb is a module of this folder with ``add_arguments(parser)``, ``run(args) -> int``, a docstring whose first line is
its help, and optionally ``EXAMPLE``.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import importlib
import importlib.util
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from nemo_kto import __version__
from nemo_kto.cli.processes import tell, tell_torchrun, tell_waiting_ranks
from nemo_kto.errors import KTOError, LostContactError, StoppedEarlyError, TooManySkipsError
from nemo_kto.parents import follow_parent
from nemo_kto.peers import end_if_blocked, is_loss, lost_contact, report_with, tell_others

VERBS = ("prepare", "cache-reference", "train", "score", "convert", "report", "plan", "doctor")
_TOGETHER = ("cache-reference", "train", "score")
"""Verbs that a launcher starts on all ranks of a job, which then join."""

EXAMPLE = """\
example:
  nemo-kto train pretrained_checkpoint.restore_from_path=MODEL 'model.data.data_prefix.train=[train.jsonl]'

exit codes: 0 done, 1 a bug or a lost rank, 2 config or usage, 3 data or checkpoint, 4 stopped early and resumable
(0 under a torchrun with --max-restarts, which takes all else for a failure and starts the ranks again)

$NEMO_KTO_REQUEUE_FILE: a file that is written where a run was asked to stop and the same command goes on from there"""

REQUEUE_FILE = "NEMO_KTO_REQUEUE_FILE"
"""Environment variable: what a batch script looks for, since torchrun and srun hide exit code 4."""


def _module_name(verb: str) -> str:
    return f"nemo_kto.cli.{verb.replace('-', '_')}"


def _summary(verb: str) -> str:
    """First line of a verb's docstring, read without importing the module."""
    spec = importlib.util.find_spec(_module_name(verb))
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(_module_name(verb))
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    return (docstring or "").split("\n")[0]


def _answer_without_verb(arguments: Sequence[str]) -> NoReturn:
    """Answer --help, --version, nothing, or a verb that does not exist; ends the process."""
    width = max(len(verb) for verb in VERBS)
    verbs = "\n".join(f"  {verb:<{width}}  {_summary(verb)}" for verb in VERBS)
    parser = argparse.ArgumentParser(
        prog="nemo-kto",
        usage="nemo-kto [--help] [--version] VERB ...",
        description="KTO alignment of Megatron GPT models from thumbs-up / thumbs-down feedback.",
        epilog=f"verbs (`nemo-kto VERB --help` shows more):\n{verbs}\n\n{EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nemo_kto {__version__}")
    parser.add_argument("verb", metavar="VERB", help="what to do")
    unknown: str = parser.parse_args(arguments[:1]).verb
    near = difflib.get_close_matches(unknown, VERBS, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]!r}?" if near else f"verbs: {', '.join(VERBS)}"
    parser.error(f"no verb {unknown!r}; {advice}")


def _log_to_stderr() -> None:
    """Show what the library logs, once per job: as lines of ours, whatever other packages do to the root logger."""
    handler = logging.StreamHandler()
    handler.setFormatter(_LowerLevel("%(levelname)s: %(message)s"))
    logger = logging.getLogger("nemo_kto")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(
        logging.INFO if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0" else logging.ERROR
    )


class _LowerLevel(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        own = copy.copy(record)  # other handlers get the same record
        own.levelname = record.levelname.lower()
        return super().format(own)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code.

    Args:
        argv: the command line without the program's name; None: that of this process.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] not in VERBS:
        _answer_without_verb(arguments)
    verb = arguments[0]
    # Before torch starts its threads: those that wait for each other sleep. Spinning counts as work, and where cores
    # are shared it keeps the one that would end the wait from running.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    module = importlib.import_module(_module_name(verb))
    parser = argparse.ArgumentParser(
        prog=f"nemo-kto {verb}",
        description=module.__doc__,
        epilog=getattr(module, "EXAMPLE", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    options = parser.parse_args(arguments[1:])
    _log_to_stderr()
    report_with(tell)
    try:
        code: int = module.run(options)
        sys.stdout.flush()
        if code == 0 and verb in _TOGETHER:
            _take_request_back()
    except KTOError as error:
        return _end(error, verb)
    except BrokenPipeError:
        if verb in _TOGETHER or _stdout_is_read():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        tell_others("interrupted")
        print("interrupted", file=sys.stderr)
        end_if_blocked(130)
        return 130
    except Exception as error:
        if is_loss(error):
            return _end(lost_contact(error), verb)
        said = f"{type(error).__name__}: {error}"
        tell_torchrun(said)
        tell_others(said)
        if verb in _TOGETHER:
            tell_waiting_ranks(said)
        raise
    return code


def _stdout_is_read() -> bool:
    """Whether what reads standard output is still there: `head` leaves when it has enough."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    return not watch.poll(0)


def _end(error: KTOError, verb: str) -> int:
    """Say it here, and to the other ranks unless they end for the same reason; the exit code."""
    if os.environ.get("NEMO_KTO_TRACEBACK") == "1":
        traceback.print_exc()
    tell(error)
    if isinstance(error, StoppedEarlyError):
        _ask_for_requeue(error)
    else:
        tell_others(str(error))
        if verb in _TOGETHER and not isinstance(error, LostContactError):
            tell_waiting_ranks(str(error))
    code = 0 if _is_on_purpose(error) and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" else error.exit_code
    end_if_blocked(code)
    return code


def _is_on_purpose(error: KTOError) -> bool:
    """Whether a run did as it was told. torchrun starts ranks again that end with anything but 0, at once."""
    return isinstance(error, StoppedEarlyError) and not isinstance(error, TooManySkipsError)


def _ask_for_requeue(error: StoppedEarlyError) -> None:
    """Leave word for the script around the job. Every rank does: a launcher may kill the others when one has ended."""
    file = os.environ.get(REQUEUE_FILE)
    if not file or not _is_on_purpose(error):
        return
    try:
        if not Path(file).exists():
            Path(file).write_text(f"{error}\n", encoding="utf-8")
    except OSError as problem:
        print(f"error: {REQUEUE_FILE}={file} cannot be written ({problem.strerror})", file=sys.stderr)


def _take_request_back() -> None:
    """A run that is done needs no other start, whatever it was asked before torchrun started its ranks again."""
    if file := os.environ.get(REQUEUE_FILE):
        with suppress(OSError):
            Path(file).unlink()


follow_parent()  # on import: multiprocessing imports this module in the processes that it starts


if __name__ == "__main__":
    sys.exit(main())
