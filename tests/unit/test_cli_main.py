"""The entry point: help without heavy imports, suggestions, exit codes."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import types

import pytest

from nemo_kto import __version__
from nemo_kto.cli import main as entry
from nemo_kto.errors import ConfigError, DataError, KTOError, LostContactError, StoppedEarlyError, TooManySkipsError

HEAVY = ("torch", "nemo", "megatron", "lightning", "transformers", "matplotlib", "pandas")


def run_in_new_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line and print, last, the heavy modules that it imported."""
    code = (
        "import sys\nfrom nemo_kto.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as stop:\n    code = stop.code\n"
        f"print('HEAVY', *[m for m in {HEAVY!r} if m in sys.modules])\nsys.exit(code)"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("verb", ["", *entry.VERBS])
def test_help_shows_an_example_and_imports_nothing_heavy(verb):
    done = run_in_new_process(*verb.split(), "--help")
    assert done.returncode == 0, done.stderr
    *_, imported = done.stdout.splitlines()
    assert imported == "HEAVY"
    assert f"nemo-kto {verb}".strip() in done.stdout
    assert "example" in done.stdout


def test_help_lists_every_verb_with_its_summary(capsys):
    with pytest.raises(SystemExit) as stop:
        entry.main(["--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for verb in entry.VERBS:
        (line,) = [text for text in lines if text.startswith(f"  {verb} ")]
        assert len(line.split()) > 3


def test_module_runs_as_a_script():
    done = subprocess.run(
        [sys.executable, "-m", "nemo_kto.cli.main", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"nemo_kto {__version__}")


def test_a_reader_that_leaves_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "nemo_kto.cli.main", "plan", "--model", "8b", "--gpus", "8"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean 'train'?"),
        (["convrt", "--help"], "did you mean 'convert'?"),
        (["zzz"], "verbs: "),
        ([], "VERB"),
        (["--verbose"], "VERB"),
        (["report"], "--metrics"),
        (["report", "--metrics", "x", "--colour"], "--colour"),
    ],
)
def test_usage_errors_end_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        entry.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def verb(monkeypatch):
    """Put a stand-in for the report verb in place; the test says what its run does."""

    def install(run) -> None:
        module = types.ModuleType("nemo_kto.cli.report", "A verb.")
        module.add_arguments = lambda parser: parser.add_argument("words", nargs="*")
        module.run = run
        monkeypatch.setitem(sys.modules, "nemo_kto.cli.report", module)

    return install


def raiser(error: BaseException):
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [(KTOError("why"), 1), (ConfigError("why"), 2), (DataError("why"), 3), (StoppedEarlyError("why"), 4)],
)
def test_user_errors_are_one_message_and_their_exit_code(verb, capsys, error, code):
    verb(raiser(error))
    assert entry.main(["report"]) == code
    assert capsys.readouterr().err == "error: why\n"


@pytest.mark.parametrize(
    ("error", "asks"),
    [
        (StoppedEarlyError("stopped by SIGTERM"), True),
        (TooManySkipsError("the loss is nan"), False),
        (ConfigError("why"), False),
        (LostContactError("why"), False),
    ],
)
def test_only_a_run_that_was_asked_to_stop_asks_to_be_started_again(verb, monkeypatch, tmp_path, error, asks):
    note = tmp_path / "requeue"
    monkeypatch.setenv(entry.REQUEUE_FILE, str(note))
    verb(raiser(error))
    for _ in range(2):  # every rank leaves it
        assert entry.main(["report"]) == error.exit_code
    assert [file.read_text() for file in tmp_path.iterdir()] == (["stopped by SIGTERM\n"] if asks else [])


@pytest.mark.parametrize(
    ("error", "restarts", "code"),
    [
        (StoppedEarlyError("its time is up"), "3", 0),
        (StoppedEarlyError("its time is up"), "0", 4),
        (TooManySkipsError("the loss is nan"), "3", 4),
        (DataError("why"), "3", 3),
    ],
)
def test_torchrun_is_given_no_failure_to_answer_with_a_restart(verb, monkeypatch, error, restarts, code):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    verb(raiser(error))
    assert entry.main(["report"]) == code


def test_a_run_that_is_done_takes_its_request_back(verb, monkeypatch, tmp_path):
    """Made, say, by ranks that were about to stop when another failed, and torchrun started all of them again."""
    note = tmp_path / "requeue"
    monkeypatch.setenv(entry.REQUEUE_FILE, str(note))
    verb(raiser(StoppedEarlyError("stopped by SIGTERM")))
    assert entry.main(["report"]) == 4
    assert note.exists()
    verb(lambda _: 4)  # processes that this one has started have stopped
    assert entry.main(["report"]) == 4
    assert note.exists()
    verb(lambda _: 0)
    assert entry.main(["report"]) == 0
    assert note.exists(), "it is the training's"
    monkeypatch.setitem(sys.modules, "nemo_kto.cli.train", sys.modules["nemo_kto.cli.report"])
    for _ in range(2):  # every rank does
        assert entry.main(["train"]) == 0
        assert not note.exists()


def test_a_note_that_cannot_be_left_is_said(verb, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(entry.REQUEUE_FILE, str(tmp_path / "no" / "folder"))
    verb(raiser(StoppedEarlyError("stopped by SIGTERM")))
    assert entry.main(["report"]) == 4
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "error: stopped by SIGTERM"
    assert said[1].endswith("cannot be written (No such file or directory)")


def test_traceback_on_request(verb, capsys, monkeypatch):
    monkeypatch.setenv("NEMO_KTO_TRACEBACK", "1")
    verb(raiser(DataError("why")))
    assert entry.main(["report"]) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: why\n")


def test_interrupt_and_bugs(verb):
    verb(raiser(KeyboardInterrupt()))
    assert entry.main(["report"]) == 130
    verb(raiser(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        entry.main(["report"])


def test_the_rest_of_the_line_belongs_to_the_verb(verb):
    seen = []
    verb(lambda args: seen.append(args.words) or 0)
    assert entry.main(["report", "a=1", "~b", "+c=d"]) == 0
    assert seen == [["a=1", "~b", "+c=d"]]
