"""Whether an architecture can be cut into a parallel layout, and how its vocabulary is padded for it."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_kto.config.architecture import Architecture
from nemo_kto.config.schema import ModelConfig
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


def world_problems(model: ModelConfig, world_size: int, nodes: int) -> Iterator[str]:
    """Why ``world_size`` ranks, spread evenly over ``nodes``, cannot be laid out; nothing where they can."""
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    if tp < 1 or pp < 1 or model.micro_batch_size < 1:
        return
    if model.sequence_parallel and tp == 1:
        yield "model.sequence_parallel=true needs model.tensor_model_parallel_size above 1"
    if world_size % (tp * pp):
        places = f"{'1 node' if nodes == 1 else f'{nodes} nodes'} x {world_size // nodes}"
        fits = ", ".join(map(str, _divisors(world_size)))
        yield (
            f"world size {world_size} is not a multiple of model.tensor_model_parallel_size {tp} x "
            f"model.pipeline_model_parallel_size {pp} = {tp * pp}: start a multiple of {tp * pp} processes, or make "
            f"TP x PP one of {fits} (world {world_size} = {places})"
        )
        return
    dp = world_size // (tp * pp)
    unit = model.micro_batch_size * dp
    if model.global_batch_size % unit:
        below = model.global_batch_size // unit * unit
        near = f"{below} or {below + unit}" if below else str(unit)
        yield (
            f"model.global_batch_size {model.global_batch_size} is not a multiple of model.micro_batch_size "
            f"{model.micro_batch_size} x data_parallel {dp} (world {world_size} / (TP {tp} x PP {pp})) = {unit}: "
            f"take {near}"
        )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _problems(key: str, parts: int, sizes: dict[str, int]) -> list[str]:
    if parts < 1:
        return [f"model.{key} is {parts}; it must be at least 1"]
    wrong = [f"{size} {what} % {parts} = {size % parts}" for what, size in sizes.items() if size % parts]
    if not wrong:
        return []
    fits = [str(n) for n in range(1, min(sizes.values()) + 1) if all(size % n == 0 for size in sizes.values())]
    return [f"model.{key}={parts} does not divide this model: {'; '.join(wrong)}. Sizes that do: {', '.join(fits)}"]
