"""A network of a few bare layers, for tests of what only looks at parameters."""

from __future__ import annotations

from typing import Any

from torch import nn


def toy(*layers: nn.Module) -> Any:
    """What the swap takes for a GPT: ``layers``, and no forward pass."""
    from nemo_kto.gpt.network import HiddenStateGPT

    class Toy(HiddenStateGPT):
        def __init__(self) -> None:
            nn.Module.__init__(self)  # not Megatron's, which builds a whole network
            self.layers = nn.ModuleList(layers)

    return Toy()
