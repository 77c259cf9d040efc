"""What every reference policy offers. Not a policy itself."""

from __future__ import annotations

from typing import Protocol

from nemo_kto.data.batch import StepBatch


class Reference(Protocol):
    """A frozen policy that adds its log-probs to a batch. Which one did cannot be told from the result."""

    def score(self, step: StepBatch) -> StepBatch:
        """The same share with ``ref_logps`` and, where KL pairs are used, ``ref_kl_logps`` on the last stage.

        The policy's weights, training mode, gradients and random streams are as before on return, also when it raises.
        """
        ...
