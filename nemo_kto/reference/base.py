"""What every reference policy offers. Not a policy itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from nemo_kto.data.batch import Rows


class Reference(Protocol):
    """A frozen policy that scores rows. Which one did cannot be told from the result."""

    def log_probs(self, rows: Sequence[Rows]) -> list[Tensor]:
        """Sequence log-probs of these rows under the reference policy, which takes the policy's place once for all.

        Every rank of the job calls it together, a rank without rows too: making the policy's parameters whole, before
        and after, may need all of them. The policy's weights, training mode, gradients and random streams are as
        before on return, also when it raises.

        Args:
            rows: one entry per forward pass, B_i rows each: they are not grouped anew.

        Returns:
            On the last stage, per entry of ``rows``, [B_i] float64 nats, without gradient: sum of log p over the
            labelled tokens. Elsewhere an empty list.
        """
        ...
