"""Errors meant for the user: one message that names culprit and fix, and an exit code. No traceback is shown."""

from __future__ import annotations

from typing import ClassVar


class KTOError(Exception):
    """Base of all errors that the command line prints without a traceback. ``exit_code`` ends the process."""

    exit_code: ClassVar[int] = 1


class ConfigError(KTOError):
    """A config key, a command-line argument or a parallel layout is wrong. The message names the key."""

    exit_code = 2


class DataError(KTOError):
    """A training file or record is wrong. The message names ``file:line``."""

    exit_code = 3


class CheckpointError(KTOError):
    """A model directory or checkpoint is missing, incomplete or unsupported. The message names the tensor or file."""

    exit_code = 3


class StoppedEarlyError(KTOError):
    """The run ended before its last step and can be resumed."""

    exit_code = 4


class TooManySkipsError(StoppedEarlyError):
    """Too many steps in a row were not finite. Resumable, but by somebody who has looked, never by a script."""


class LostContactError(KTOError):
    """Another rank has gone. Not resumable by itself (exit code 1): whether it is, the other rank's error says.

    A script that starts a run again on exit code 4 would otherwise do so for ever when the other rank's fault is in
    the config or the data.
    """

    exit_code = 1
