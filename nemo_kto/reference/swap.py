"""The reference policy by weight swap: its weights wait in host memory and take the policy's place to score."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from nemo_kto.data.batch import Rows
from nemo_kto.errors import KTOError
from nemo_kto.gpt.forward import Passes
from nemo_kto.gpt.live import is_reference, mark_reference, parameters_settled, require_policy
from nemo_kto.reference.host_weights import HostWeights
from nemo_kto.reference.keeping import Keeper, Masters, keepers

logger = logging.getLogger(__name__)


class WeightSwap:
    """Puts the reference weights where the policy's are, for as long as a ``with`` block lasts.

    This rank's parameter bytes P cross from host to device once per swap, the reference's, and three times where the
    policy has to wait in host memory. Without CUDA nothing crosses; what would is counted all the same.

    Args:
        chunks: model chunks, wrapped as they are trained.
        reference: the reference policy's weights, captured from the same parameters; or what captures them, which the
            first swap does on all ranks together.
        restore: where the policy waits: ``auto`` (the first that is possible), ``device`` (a second copy there),
            ``masters`` (the optimizer's, see :meth:`use_masters`) or ``host``.
    """

    def __init__(
        self, chunks: Sequence[nn.Module], reference: HostWeights | Callable[[], HostWeights], restore: str = "auto"
    ) -> None:
        self._chunks = list(chunks)
        self._reference = reference
        self._restore = restore
        self._keepers = keepers(restore, self._chunks, None)
        self._latest = ""
        self.bytes_moved = 0
        """Bytes copied between host and device since the start, both ways."""

    def use_masters(self, masters: Masters) -> None:
        """Let the policy be put back from an optimizer's masters, once there is one."""
        self._keepers = keepers(self._restore, self._chunks, masters)

    @property
    def reference(self) -> HostWeights:
        """The reference policy's weights; captured now where they have not been."""
        if not isinstance(self._reference, HostWeights):
            self._reference = self._reference()
        return self._reference

    @property
    def active(self) -> bool:
        """Whether the live parameters are the reference's right now."""
        return is_reference(self._chunks)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model is the reference inside the block: no gradient, parameter gathers finished, signals held.

        On leaving, also by an exception, the policy's parameters are back bit for bit.

        Raises:
            KTOError: the policy cannot wait where ``restore`` says.
        """
        require_policy(self._chunks, "another swap")
        reference = self.reference
        with ExitStack() as stack:
            stack.enter_context(_signals_held())
            stack.enter_context(parameters_settled(self._chunks))
            stack.enter_context(torch.no_grad())
            keeper = self._keep()
            mark_reference(self._chunks, True)
            try:
                reference.restore()
                yield
            finally:
                keeper.put_back()
                mark_reference(self._chunks, False)
                self.bytes_moved += keeper.bytes_moved + reference.num_bytes

    def _keep(self) -> Keeper:
        reasons: list[str] = []
        for keeper in self._keepers:
            reason = keeper.keep()
            if reason is None:
                if reasons and keeper.name != self._latest:
                    logger.info("the policy waits in %s during a swap (%s)", keeper.name, "; ".join(reasons))
                self._latest = keeper.name
                return keeper
            reasons.append(f"{keeper.name}: {reason}")
        raise KTOError(f"model.kto.reference_restore={self._restore}: {'; '.join(reasons)}; use auto or host")


class SwapReference:
    """A :class:`~nemo_kto.reference.base.Reference` that scores through a :class:`WeightSwap`.

    Args:
        swap: the swap.
        passes: the passes of the model that the swap acts on.
    """

    def __init__(self, swap: WeightSwap, passes: Passes) -> None:
        self._swap = swap
        self._passes = passes

    def log_probs(self, rows: Sequence[Rows]) -> list[Tensor]:
        """See :class:`~nemo_kto.reference.base.Reference`. One swap serves all rows."""
        with self._swap.swapped():
            return self._passes.log_probs(rows)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Keep termination signals until the block ends: a handler that saves must not find the wrong weights.

    Only the main thread can set handlers; in any other there is nothing to hold. Handlers that C code installed
    cannot be put back by Python: they stay.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    previous: dict[int, Any] = {}

    def hold(number: int, _frame: FrameType | None) -> None:
        held.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        if signal.getsignal(number) is not None:
            previous[number] = signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)
