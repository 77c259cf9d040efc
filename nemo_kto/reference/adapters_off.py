"""The reference policy of LoRA: the network without its adapters. Nothing is copied and nothing moves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nemo_kto.data.batch import Rows
from nemo_kto.gpt.forward import Passes
from nemo_kto.gpt.live import mark_reference, require_policy
from nemo_kto.gpt.lora import adapters_off


class AdaptersOffReference:
    """A :class:`~nemo_kto.reference.base.Reference` that is the base model of adapters.

    Args:
        chunks: model chunks with adapters, wrapped as they are trained.
        passes: the passes of that model.
    """

    def __init__(self, chunks: Sequence[nn.Module], passes: Passes) -> None:
        self._chunks = list(chunks)
        self._passes = passes

    def log_probs(self, rows: Sequence[Rows]) -> list[Tensor]:
        """See :class:`~nemo_kto.reference.base.Reference`. While it runs, the model counts as the reference."""
        require_policy(self._chunks, "scoring under the reference")
        mark_reference(self._chunks, True)
        try:
            with adapters_off(self._chunks):
                return self._passes.log_probs(rows)
        finally:
            mark_reference(self._chunks, False)
