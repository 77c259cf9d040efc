"""What `make test-launch` needs of the machine, and the table that it prints at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import trainings
from trainings import LONG_WORDS, SHORT_WORDS, TORCHRUN, Material

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "gcc")
_TABLE = pytest.StashKey["list[Row]"]()


@dataclass
class Row:
    """A line of the table.

    Attributes:
        path: how the ranks were started, and what befell them.
        ranks: how many.
        result: how it ended; a test that fails leaves the first value.
        restart_s: seconds from the blow until the first new step.
        equal: how the trajectory compares with the undisturbed one.
    """

    path: str
    ranks: int
    result: str = "FAILED"
    restart_s: float | None = None
    equal: str = "-"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = []


@pytest.fixture
def row(request: pytest.FixtureRequest):
    """Make a line of the table: ``row(path, ranks)``; the test completes it."""

    def make(path: str, ranks: int) -> Row:
        made = Row(path, ranks)
        request.config.stash[_TABLE].append(made)
        return made

    return make


@pytest.fixture(scope="session")
def machine() -> None:
    """Fails, and never skips, where the machine lacks something: else nothing would be tested, and nobody told."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if os.geteuid() != 0:
        pytest.fail("needs root, for namespaces of its own and for Slurm's daemons; run as root, in a container say")
    if missing:
        pytest.fail(f"not found: {', '.join(missing)}; install the packages of tests/launch/packages.txt")


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Model and data."""
    return Material.make(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="session")
def alone(material: Material) -> list[dict]:
    """The steps of a short run of one process."""
    results = material.root / "alone"
    trainings.run_script(TORCHRUN / "single_node.sh", material, results, *SHORT_WORDS, RANKS_PER_NODE="1")
    return trainings.lines(results)


@pytest.fixture(scope="session")
def undisturbed(material: Material) -> list[dict]:
    """The steps of a long run of two processes, data parallel, that nothing happens to."""
    results = material.root / "undisturbed"
    trainings.run_script(TORCHRUN / "single_node.sh", material, results, *LONG_WORDS, RANKS_PER_NODE="2")
    return trainings.lines(results)


@pytest.fixture(scope="session", autouse=True)
def no_other_launcher() -> Iterator[None]:
    """Launchers of another job do not concern these runs."""
    names = [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]
    kept = {name: os.environ.pop(name) for name in (*names, "RANK", "WORLD_SIZE") if name in os.environ}
    yield
    os.environ.update(kept)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_TABLE]
    if not rows:
        return
    cells = [("path", "ranks", "result", "restart", "trajectory equal")]
    for row in rows:
        restart = "-" if row.restart_s is None else f"{row.restart_s:.0f} s"
        cells.append((row.path, str(row.ranks), row.result, restart, row.equal))
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    terminalreporter.section("launched (restart: from the blow until the first new step)")
    for line in cells:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
