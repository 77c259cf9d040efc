"""A list of what is wrong with the data, for one report. Not for deciding what is wrong."""

from __future__ import annotations

from nemo_kto.errors import DataError

MAX_LISTED = 20
"""Problems that a report spells out; the rest is counted."""
_MAX_LENGTH = 400  # characters of one problem: it may quote the file, or a library that does


class Problems:
    """Collects problems and raises one error for all of them. Memory stays bounded however bad a file is."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._listed: list[str] = []
        self.count = 0

    def add(self, where: str, what: str) -> None:
        """Note one problem; ``where`` is ``file``, ``file:line`` or ``file:row N``."""
        self.count += 1
        if len(self._listed) < MAX_LISTED:
            self._listed.append(f"{where}: {_one_line(what)}")

    def raise_if_any(self) -> None:
        """Report everything collected.

        Raises:
            DataError: if any problem was added; its message lists the first 20 and counts the rest.
        """
        if not self.count:
            return
        lines = [f"{self._title} ({self.count}):", *self._listed]
        if self.count > len(self._listed):
            lines.append(f"... and {self.count - len(self._listed)} more")
        raise DataError("\n  ".join(lines))


def _one_line(text: str) -> str:
    """``text`` without line breaks and control characters, and without the middle of a very long one."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    half = _MAX_LENGTH // 2
    return printable if len(printable) <= _MAX_LENGTH else f"{printable[:half]} ... {printable[-half:]}"
