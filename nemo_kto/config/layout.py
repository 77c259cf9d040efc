"""Whether an architecture can be cut into a parallel layout, and how its vocabulary is padded for it."""

from __future__ import annotations

from nemo_kto.config.architecture import Architecture
from nemo_kto.errors import ConfigError


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding after padding to a multiple of TP. The added rows are zero and take part in nothing."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def check_layout(arch: Architecture, *, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Refuse a layout that does not divide the architecture.

    The vocabulary is padded, so it never stands in the way.

    Raises:
        ConfigError: with every size that does not divide, and the parallel sizes that do.
    """
    sharded = {
        "attention heads": arch.num_attention_heads,
        "key/value heads": arch.num_query_groups,
        "feed-forward columns (intermediate_size)": arch.ffn_hidden_size,
        "hidden columns (hidden_size)": arch.hidden_size,
    }
    problems = _problems("tensor_model_parallel_size", tensor_parallel, sharded)
    problems += _problems("pipeline_model_parallel_size", pipeline_parallel, {"layers": arch.num_layers})
    if problems:
        raise ConfigError("\n".join(problems))


def _problems(key: str, parts: int, sizes: dict[str, int]) -> list[str]:
    if parts < 1:
        return [f"model.{key} is {parts}; it must be at least 1"]
    wrong = [f"{size} {what} % {parts} = {size % parts}" for what, size in sizes.items() if size % parts]
    if not wrong:
        return []
    fits = [str(n) for n in range(1, min(sizes.values()) + 1) if all(size % n == 0 for size in sizes.values())]
    return [f"model.{key}={parts} does not divide this model: {'; '.join(wrong)}. Sizes that do: {', '.join(fits)}"]
