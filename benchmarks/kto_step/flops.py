"""Floating-point operations of a KTO step in closed form. Checked against torch's counter by a test and in every run.

A product of an [m, k] with a [k, n] matrix is 2 m k n operations, and only products count: norms, activations, rotary
embeddings, softmax and the optimizer are left out, as torch's counter leaves them out. Attention counts all S x S
pairs of a row of S positions, also those that causality masks, which is torch's convention too.

Per token, a decoder of L layers multiplies with M = L (H (A + 2 G) D + A D H + 3 H F) elements (A heads and G key and
value heads of D, feed-forward of F), and per scored position the head with H V. So

    forward   2 tokens M + 4 squares L A D + 2 positions H V
    backward  4 tokens M + 10 squares L A D + 4 positions H V     (+ 2 positions H V where logits are made again)

where squares is the sum of S^2 over rows. The backward pass makes attention's scores again (5 products for 2), and
needs the gradient of the first layer's input, which is the embedding's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-shaped decoder that products depend on."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int

    @property
    def matrix_elements(self) -> int:
        """M: elements of the decoder's matrices, embedding and head left out."""
        attention = self.hidden * (self.heads + 2 * self.groups) * self.head_dim
        return self.layers * (attention + self.heads * self.head_dim * self.hidden + 3 * self.hidden * self.ffn)


@dataclass(frozen=True)
class Pass:
    """One run of rows through the network.

    Attributes:
        tokens: positions computed, padding included.
        pad_tokens: those of them that are padding.
        squares: sum over rows of the square of their positions, padding included.
        positions: positions projected onto the vocabulary.
        trains: whether a backward pass follows.
    """

    tokens: int
    pad_tokens: int
    squares: int
    positions: float
    trains: bool


def pass_flops(shape: Shape, run: Pass, *, remakes_logits: bool = False) -> float:
    """Operations of one pass, its backward included where it trains.

    Args:
        shape: the network.
        run: what goes through it.
        remakes_logits: whether the backward pass projects onto the vocabulary once more instead of keeping logits.
    """
    matrices = 2 * run.tokens * shape.matrix_elements
    attention = 2 * run.squares * shape.layers * shape.heads * shape.head_dim
    head = 2 * run.positions * shape.hidden * shape.vocab
    if not run.trains:
        return matrices + 2 * attention + head
    return 3 * matrices + 7 * attention + (4 if remakes_logits else 3) * head


def step_flops(shape: Shape, passes: Iterable[Pass], *, remakes_logits: bool = False) -> float:
    """Operations of all passes of a step."""
    return sum(pass_flops(shape, run, remakes_logits=remakes_logits) for run in passes)
