"""Acts of several ranks on files: what fails on one fails on all, as one error that names the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from nemo_kto.distributed.collectives import raise_together
from nemo_kto.errors import CheckpointError

_T = TypeVar("_T")
_MAX_REASON = 300  # characters; a missing key comes with the list of all others


def on_all_ranks(action: Callable[[], _T], what_failed: str) -> _T:
    """Run an act that every rank takes part in.

    torch's CheckpointException is no Exception; it holds what the single ranks raised.

    Raises:
        CheckpointError: on every rank, if the act failed on any.
    """
    failure: CheckpointError | None = None
    try:
        result = action()
    except (Exception, CheckpointException) as error:
        failure = _named(error, what_failed)
    raise_together(failure, dist.group.WORLD)
    return result


def on_first_rank(action: Callable[[], None], what_failed: str) -> None:
    """Run an act on world rank 0 while the others wait.

    Raises:
        CheckpointError: on every rank, if the act failed.
    """
    on_all_ranks(action if dist.get_rank() == 0 else _nothing, what_failed)


def _nothing() -> None:
    return None


def _named(error: Exception | CheckpointException, what_failed: str) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    cause = next((e for e, _ in error.failures.values()), error) if hasattr(error, "failures") else error
    reason = " ".join(str(cause).split())
    reason = reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}..."
    failure = CheckpointError(f"{what_failed}: {type(cause).__name__}: {reason}")
    failure.__cause__ = error
    return failure
