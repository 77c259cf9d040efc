"""How many samples of each kind one optimizer step sees. Not for counting them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchCounts:
    """Counts over the *whole global batch*: all micro-batches of all data-parallel ranks. Known before any forward."""

    num_samples: int
    num_desirable: int
    num_undesirable: int
    num_kl_pairs: int
    """Samples that have a mismatched partner."""
    num_tokens: int
    """Tokens of the (x_i, y_i) rows, prompts included, padding excluded."""
    num_inputs: int = 0
    """Positions of (x_i, y_i) rows and KL rows that enter the network, padding excluded."""
    num_pads: int = 0
    """Positions that pad them."""

    @property
    def pad_fraction(self) -> float:
        """Padding among all positions that enter the network."""
        positions = self.num_inputs + self.num_pads
        return self.num_pads / positions if positions else 0.0
