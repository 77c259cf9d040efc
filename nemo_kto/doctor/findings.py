"""What a probe returns: facts, lines to read, and problems with their fixes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1
"""Version of the JSON that :func:`as_json` makes; it changes when a key goes or changes its meaning."""
BLOCKED = 2
"""Exit code where something stands in the way of training."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Attributes:
        what: is wrong.
        why: it matters.
        fix: what mends it; a command where there is one.
        blocks: whether training cannot work before it is mended.
    """

    what: str
    why: str
    fix: str
    blocks: bool = False


@dataclass
class Finding:
    """What one probe has found.

    Attributes:
        name: of the probe; the key of its facts in the JSON.
        title: above its lines.
        facts: JSON values.
        lines: for people, each one fact.
        problems: none where all is well.
    """

    name: str
    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def wrong(self, what: str, why: str, fix: str, *, blocks: bool = False) -> None:
        """Note a problem."""
        self.problems.append(Problem(what, why, fix, blocks))


def exit_code(findings: list[Finding]) -> int:
    """0 where nothing blocks training, 2 otherwise."""
    return BLOCKED if any(problem.blocks for finding in findings for problem in finding.problems) else 0


def as_json(findings: list[Finding], version: str) -> dict[str, Any]:
    """The whole report as one JSON object."""
    problems = [
        {"probe": finding.name, **asdict(problem)} for finding in findings for problem in sorted_problems(finding)
    ]
    code = exit_code(findings)
    return {
        "schema": SCHEMA,
        "nemo_kto": version,
        "ok": code == 0,
        "exit_code": code,
        "probes": {finding.name: finding.facts for finding in findings},
        "problems": problems,
    }


def as_text(findings: list[Finding], version: str) -> str:
    """The whole report for people: what was found, then a verdict with fixes, worst first."""
    parts = [f"nemo_kto {version}"]
    for finding in findings:
        parts += ["", finding.title, *(f"  {line}" for line in finding.lines)]
    return "\n".join([*parts, "", *_verdict(findings)])


def sorted_problems(finding: Finding) -> list[Problem]:
    """Those that block first."""
    return sorted(finding.problems, key=lambda problem: not problem.blocks)


def _verdict(findings: list[Finding]) -> list[str]:
    problems = [problem for finding in findings for problem in finding.problems]
    blocking = [problem for problem in problems if problem.blocks]
    others = [problem for problem in problems if not problem.blocks]
    if not problems:
        return ["verdict: nothing stands in the way of training"]
    lines = [f"verdict: {_counted(len(blocking), 'problem')} must be mended before a training can run"]
    if not blocking:
        lines = [f"verdict: nothing stands in the way of training; {_counted(len(others), 'warning')}"]
    elif others:
        lines[0] += f"; {_counted(len(others), 'warning')}"
    for label, group in (("PROBLEM", blocking), ("warning", others)):
        for problem in group:
            lines += [f"  {label}: {problem.what}", f"    why: {problem.why}", f"    fix: {problem.fix}"]
    return lines


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
