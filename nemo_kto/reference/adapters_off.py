"""The reference policy of LoRA: the network without its adapters. Nothing is copied and nothing moves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from nemo_kto.data.batch import StepBatch
from nemo_kto.gpt.forward import Passes
from nemo_kto.gpt.live import mark_reference, require_policy
from nemo_kto.gpt.lora import adapters_off
from nemo_kto.reference.base import scored


class AdaptersOffReference:
    """A :class:`~nemo_kto.reference.base.Reference` that is the base model of adapters.

    Args:
        chunks: model chunks with adapters, wrapped as they are trained.
        passes: the passes of that model.
        micro_batch_size: rows per forward.
        needs_kl: whether the mismatched pairs are scored too.
    """

    def __init__(self, chunks: Sequence[nn.Module], passes: Passes, *, micro_batch_size: int, needs_kl: bool) -> None:
        self._chunks = list(chunks)
        self._passes = passes
        self._micro_batch_size = micro_batch_size
        self._needs_kl = needs_kl

    def score(self, step: StepBatch) -> StepBatch:
        """See :class:`~nemo_kto.reference.base.Reference`. While it runs, the model counts as the reference."""
        require_policy(self._chunks, "scoring under the reference")
        mark_reference(self._chunks, True)
        try:
            with adapters_off(self._chunks):
                return scored(step, self._passes, self._micro_batch_size, needs_kl=self._needs_kl)
        finally:
            mark_reference(self._chunks, False)
