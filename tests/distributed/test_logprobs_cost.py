"""What the chunked head spends: memory, collectives, matrix products; and that nothing is spent on frozen inputs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from allocations import Allocations
from harness import run_ranks
from head_inputs import CHUNK_ROWS, HIDDEN, TOKENS, Inputs

from nemo_kto.distributed import logprobs

pytestmark = pytest.mark.distributed

LARGE_VOCAB, ROWS = 512, 8
FEW_COLUMNS, MANY_COLUMNS = 2, 160
"""Of the hidden states: for a head that is smaller than half a chunk of logits, and one larger than 64 rows."""


# ------------------------------------------------------------------------------------------------ on the ranks


def _check_frozen(group: dist.ProcessGroup, rows: int, dtype: torch.dtype) -> None:
    """What needs no gradient gets none, and what it would have cost is not spent; the other gradient is the same."""
    inputs = Inputs.random(29, 32, TOKENS, dtype)
    _, hidden_grad, weight_grad = inputs.ours(group, rows)
    hidden, shard, num_chunks = inputs.hidden, inputs.shard(group), -(-TOKENS // rows)
    projections = 0 if num_chunks == 1 else num_chunks  # in backward; one chunk's is kept
    for frozen, expected in (("weight", hidden_grad), ("hidden", weight_grad)):
        leaf = (hidden if frozen == "weight" else shard).clone().requires_grad_()
        pair = (leaf, shard) if frozen == "weight" else (hidden, leaf)
        logps = inputs.logps(*pair, group, rows)
        with Allocations() as seen:
            (got,) = torch.autograd.grad(logps, leaf, inputs.grad)
        assert torch.equal(got, expected)
        assert seen.num_products == projections + num_chunks
    with torch.no_grad():
        assert torch.equal(inputs.logps(hidden, shard, group, rows), logps)  # scoring and training see the same bits
    assert not inputs.logps(hidden, shard, group, rows).requires_grad


def _check_retained(group: dist.ProcessGroup, rows: int) -> None:
    """A second backward finds what the first one found, although that one has used up the exponentials kept."""
    inputs = Inputs.random(29, 32, TOKENS, torch.float32)
    hidden, shard = inputs.hidden.clone().requires_grad_(), inputs.shard(group).requires_grad_()
    logps = inputs.logps(hidden, shard, group, rows)
    first, second = (torch.autograd.grad(logps, [hidden, shard], inputs.grad, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def _count_collectives() -> dict[tuple[int, bool], tuple[list, list]]:
    """(rows per chunk, whether hidden is frozen) -> shapes that were reduced in forward, and in backward."""
    shapes: list[tuple[int, ...]] = []
    reduce = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        shapes.append(tuple(tensor.shape))
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    found = {}
    for rows in CHUNK_ROWS:
        for frozen in (False, True):
            inputs = Inputs.random(29, 32, TOKENS, torch.float32)
            hidden, shard = inputs.hidden.requires_grad_(not frozen), inputs.shard(dist.group.WORLD).requires_grad_()
            shapes.clear()
            logps = inputs.logps(hidden, shard, dist.group.WORLD, rows)
            forward = list(shapes)
            logps.sum().backward()
            found[rows, frozen] = (forward, shapes[len(forward) :])
    return found


def _allocated(tokens: int, rows: int, dtype: torch.dtype, columns: int) -> Allocations:
    """Forward and backward of a head of ``columns`` hidden columns, in chunks of so many rows."""
    inputs = Inputs.random(LARGE_VOCAB, LARGE_VOCAB, tokens, dtype, columns=columns)
    hidden, shard = inputs.hidden.requires_grad_(), inputs.shard(dist.group.WORLD).requires_grad_()
    with Allocations() as allocations:
        torch.autograd.grad(inputs.logps(hidden, shard, dist.group.WORLD, rows), [hidden, shard], inputs.grad)
    return allocations


def _measure_memory() -> dict[str, list[int]]:
    """Bytes of large allocations in ascending order, by case."""
    shard, found = LARGE_VOCAB // dist.get_world_size(), {}
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (64, 256):
            thin = _allocated(tokens, ROWS, dtype, FEW_COLUMNS)
            found[f"{dtype}, {tokens} tokens"] = thin.at_least(ROWS * shard * dtype.itemsize)
        for rows in (ROWS, 64):
            thick = _allocated(64, rows, dtype, MANY_COLUMNS)
            found[f"{dtype}, heads in chunks of {rows}"] = thick.at_least(shard * MANY_COLUMNS * dtype.itemsize)
    found["one chunk"] = _allocated(64, 64, torch.float32, FEW_COLUMNS).at_least(ROWS * shard * 4)
    return found


def _run(rank: int) -> tuple[dict, dict]:
    for rows in CHUNK_ROWS:
        _check_retained(dist.group.WORLD, rows)
        for dtype in (torch.float32, torch.bfloat16):
            _check_frozen(dist.group.WORLD, rows, dtype)
    return _measure_memory(), _count_collectives()


# ------------------------------------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def measured() -> list[tuple[dict, dict]]:
    """What ranks that hold a half of the vocabulary measured, after their own checks."""
    return run_ranks(2, _run)


def test_the_number_of_collectives_is_not_that_of_chunks(measured):
    for _, collectives in measured:
        for (_, frozen), (forward, backward) in collectives.items():
            assert forward == [(TOKENS,), (2, TOKENS)]
            assert backward == ([] if frozen else [(TOKENS, HIDDEN)])


def test_nothing_larger_than_a_chunk_is_allocated_however_many_tokens(measured):
    """One chunk's buffer in forward and one in backward, twice in bf16: in its own dtype and in float32.

    The head is thin here, so gradients and inputs are smaller than half a chunk and do not count.
    """
    logits = ROWS * LARGE_VOCAB // 2
    for memory, _ in measured:
        for tokens in (64, 256):
            assert memory[f"torch.float32, {tokens} tokens"] == [4 * logits] * 2
            assert memory[f"torch.bfloat16, {tokens} tokens"] == [2 * logits] * 2 + [4 * logits] * 2
        assert memory["one chunk"] == [64 // ROWS * 4 * logits]  # kept for backward, which overwrites it


def test_the_heads_gradient_is_one_buffer_and_in_bf16_another_to_sum_it(measured):
    head = LARGE_VOCAB // 2 * MANY_COLUMNS
    for memory, _ in measured:
        assert memory[f"torch.float32, heads in chunks of {ROWS}"] == [4 * head]
        assert memory["torch.float32, heads in chunks of 64"] == [4 * head]
        assert memory[f"torch.bfloat16, heads in chunks of {ROWS}"] == [2 * head, 4 * head]
        assert memory["torch.bfloat16, heads in chunks of 64"] == [2 * head]


def test_the_default_budget_is_a_few_hundred_rows_of_a_large_vocabulary():
    assert logprobs.CHUNK_BYTES // (4 * 128256) >= 500
    assert logprobs.CHUNK_BYTES // (4 * 49152) == 1365
