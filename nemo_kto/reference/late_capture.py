"""Reference weights that are fetched only when a row has to be scored, while the policy's are in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from nemo_kto.gpt.live import parameters_settled, require_policy
from nemo_kto.reference.host_weights import HostWeights


@torch.no_grad()
def capture_from(chunks: Sequence[nn.Module], load: Callable[[], None]) -> HostWeights:
    """Read reference weights through the live parameters into host memory. All ranks call it together.

    The policy waits in host memory meanwhile, and is back bit for bit on return, also when reading fails. A
    termination signal does no harm: it is only noted, and asked for between steps.

    Args:
        chunks: model chunks, wrapped as they are trained.
        load: fills the live parameters with the reference, in place.

    Raises:
        CheckpointError: whatever ``load`` raises.
    """
    require_policy(chunks, "reading the reference")
    with parameters_settled(chunks):
        policy = HostWeights(chunks)
        try:
            load()
            return HostWeights(chunks)
        finally:
            policy.restore()
