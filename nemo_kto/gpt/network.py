"""Megatron's GPTModel with its last stage cut open: hidden states come out, not logits over the whole vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module

ADAPTERS = "adapters."
"""Prefix, within a decoder layer, of the names of what adapters add to it."""
_LOCAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


class HiddenStateGPT(GPTModel):
    """A GPT whose forward ends after the final norm.

    The last stage returns hidden states [s, b, h] in the model's dtype, [s / TP, b, h] under sequence parallelism;
    other stages return what they pass on, as in Megatron. Log-probs of the few positions that matter are computed
    from them, so that [b, s, V] never exists.
    """

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # A private name of Megatron 0.16 (hence the upper bound in pyproject.toml): the one method after the decoder.
        return hidden_states

    def head_weight(self) -> torch.nn.Parameter:
        """The LM head's weight, [V_padded / TP, h], vocab-sharded over TP. It is the embedding when tied.

        Raises:
            RuntimeError: this pipeline stage has no LM head.
        """
        if not self.post_process:
            raise RuntimeError("only the last pipeline stage holds the LM head")
        return (
            self.shared_embedding_or_output_weight() if self.output_layer.weight is None else self.output_layer.weight
        )

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits of every position, [s, b, V_padded / TP] from what :meth:`forward` returned. For tests: it is large.

        Columns from the true vocabulary on are padding and mean nothing.
        """
        return self.output_layer(hidden_states, weight=self.head_weight())[0]

    def global_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters of this chunk, without adapters, by names that count layers over all pipeline stages, from 0."""
        for name, parameter in self.named_parameters():
            match = _LOCAL_LAYER.match(name)
            if match is not None:
                if name.startswith(ADAPTERS, match.end()):
                    continue
                layer = self.decoder.layers[int(match[1])].layer_number - 1
                name = f"decoder.layers.{layer}.{name[match.end() :]}"
            yield name, parameter


class Bfloat16Module(Float16Module):
    """Megatron's half-precision wrapper, returning what the network computed instead of a float32 copy of it."""

    def forward(self, *inputs: Any, fp32_output: bool = False, **kwargs: Any) -> torch.Tensor:
        """As Float16Module, but ``fp32_output`` is off unless asked for."""
        return super().forward(*inputs, fp32_output=fp32_output, **kwargs)


def unwrap(chunk: torch.nn.Module) -> HiddenStateGPT:
    """The network inside DDP and half-precision wrappers."""
    while not isinstance(chunk, HiddenStateGPT):
        chunk = chunk.module
    return chunk
