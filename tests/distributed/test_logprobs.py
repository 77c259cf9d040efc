"""The chunked, vocab-parallel head, value and gradients, against float64's log_softmax over the full vocabulary."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from allocations import Allocations
from harness import run_ranks
from torch import Tensor

from nemo_kto.distributed import logprobs
from nemo_kto.distributed.logprobs import response_logprobs, sequence_sums

pytestmark = pytest.mark.distributed

HIDDEN, TOKENS = 16, 7
VOCABS = [(32, 32), (29, 32), (17, 32), (8, 32)]
"""(real, padded): even, uneven, and with ranks that hold padding alone (8 of 32 columns over 4 ranks leaves three)."""
CHUNK_ROWS = (1, 3, TOKENS)
"""Rows per chunk: a chunk for each token, chunks of 3, 3 and 1, and one for all."""

F64 = {"rtol": 1e-12, "atol": 1e-12}
# Logits are below 32, where float32 is 2^-20 = 1e-6 from the truth: in the product, the two differences, the result.
F32 = {"rtol": 0, "atol": 4e-6}
# Sums of about 30 products of order 1.
F32_GRADIENT = {"rtol": 1e-5, "atol": 1e-5}
# Half a unit in the last place of a bf16 logit below 32 is 2^-4, the target's and those of the log-sum together twice.
BF16 = {"rtol": 0, "atol": 2**-3}
# Of a whole gradient: softmax is off by a logit's 2^-4 at most and by a fourth of that on average (most are below 8).
BF16_GRADIENT = 2**-5


@dataclass(frozen=True)
class Inputs:
    """The same on every rank."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    grad: Tensor
    vocab: int

    @classmethod
    def random(cls, vocab: int, padded: int, tokens: int, dtype: torch.dtype, columns: int = HIDDEN) -> Inputs:
        generator = torch.Generator().manual_seed(vocab + tokens)
        hidden = torch.randn(tokens, columns, generator=generator)
        weight = torch.randn(padded, columns, generator=generator)
        weight[vocab:] = 50.0  # padding that would win the maximum if it were looked at
        targets = torch.randint(0, vocab, (tokens,), generator=generator)
        if tokens > 1:
            targets[0], targets[1] = 0, vocab - 1
        return cls(hidden.to(dtype), weight.to(dtype), targets, torch.randn(tokens, generator=generator), vocab)

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs and the gradients of hidden and weight, in float64 from the numbers given."""
        hidden, weight = self.hidden.double().requires_grad_(), self.weight.double().requires_grad_()
        logits = (hidden @ weight.t())[:, : self.vocab]
        logps = torch.log_softmax(logits, dim=1).gather(1, self.targets[:, None]).squeeze(1)
        return logps.detach(), *torch.autograd.grad(logps, [hidden, weight], self.grad.double())

    def shard(self, group: dist.ProcessGroup) -> Tensor:
        return self.weight.chunk(group.size())[group.rank()].clone()

    def ours(self, group: dist.ProcessGroup, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`exact`, of this rank's rows of the weight."""
        hidden, shard = self.hidden.clone().requires_grad_(), self.shard(group).requires_grad_()
        logps = self.logps(hidden, shard, group, rows)
        return logps.detach(), *torch.autograd.grad(logps, [hidden, shard], self.grad.to(logps.dtype))

    def logps(self, hidden: Tensor, shard: Tensor, group: dist.ProcessGroup, rows: int) -> Tensor:
        budget = rows * shard.shape[0] * max(shard.element_size(), 4)
        return response_logprobs(hidden, shard, self.targets, group, vocab_size=self.vocab, chunk_bytes=budget)


# ------------------------------------------------------------------------------------------------ on the ranks


def _check_exactly(group: dist.ProcessGroup, vocab: int, padded: int, rows: int) -> None:
    """A float64 head computes in float64: nothing but the formulas can be wrong."""
    inputs = Inputs.random(vocab, padded, TOKENS, torch.float64)
    exact, exact_hidden, exact_weight = inputs.exact()
    logps, hidden, weight = inputs.ours(group, rows)
    torch.testing.assert_close(logps, exact, **F64)
    torch.testing.assert_close(hidden, exact_hidden, **F64)
    torch.testing.assert_close(weight, exact_weight.chunk(group.size())[group.rank()], **F64)


def _check_rounding(group: dist.ProcessGroup, vocab: int, padded: int, rows: int) -> None:
    inputs = Inputs.random(vocab, padded, TOKENS, torch.float32)
    exact, exact_hidden, exact_weight = inputs.exact()
    logps, hidden, weight = inputs.ours(group, rows)
    assert (logps.dtype, hidden.dtype, weight.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(logps, exact.float(), **F32)
    torch.testing.assert_close(hidden, exact_hidden.float(), **F32_GRADIENT)
    torch.testing.assert_close(weight, exact_weight.chunk(group.size())[group.rank()].float(), **F32_GRADIENT)
    first = group.rank() * weight.shape[0]
    assert not weight[max(0, vocab - first) :].any()  # padding


def _check_bf16(group: dist.ProcessGroup, vocab: int, padded: int, rows: int) -> None:
    inputs = Inputs.random(vocab, padded, TOKENS, torch.bfloat16)
    exact, exact_hidden, exact_weight = inputs.exact()
    logps, hidden, weight = inputs.ours(group, rows)
    assert (logps.dtype, hidden.dtype, weight.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(logps, exact.float(), **BF16)
    assert (hidden.double() - exact_hidden).norm() <= BF16_GRADIENT * exact_hidden.norm()
    mine = exact_weight.chunk(group.size())[group.rank()]
    assert (weight.double() - mine).norm() <= BF16_GRADIENT * exact_weight.norm()


def _check_bf16_logits(group: dist.ProcessGroup, rows: int) -> None:
    """The head is the identity, so logits are bf16 numbers as they are, and the gradient of hidden is theirs."""
    vocab, padded = 29, 32
    inputs = Inputs.random(vocab, padded, TOKENS, torch.bfloat16, columns=padded)
    inputs = Inputs(4 * inputs.hidden, torch.eye(padded).bfloat16(), inputs.targets, inputs.grad, vocab)
    exact, exact_hidden, _ = inputs.exact()
    logps, hidden, _ = inputs.ours(group, rows)
    torch.testing.assert_close(logps, exact.float(), **F32)  # softmax and sums know nothing of bf16
    # A bf16 gradient carries 8 bits; it is rounded once from float32, so half an ulp, 2^-9 relative, is all.
    torch.testing.assert_close(hidden.float(), exact_hidden.float(), rtol=2**-8, atol=1e-6)
    assert not hidden[:, vocab:].any()


def _check_bf16_sum(group: dist.ProcessGroup) -> None:
    """256 chunks push one row of the head the same way. A bf16 sum stands still where a part is half its ulp."""
    tokens = 256
    hidden, weight = torch.ones(tokens, 1).bfloat16(), torch.zeros(32, 1).bfloat16()
    inputs = Inputs(hidden, weight, torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens), 32)
    _, _, exact = inputs.exact()
    for rows in (1, 4):
        _, _, gradient = inputs.ours(group, rows)
        # Each part is rounded once, and then the sum: 2^-9 each.
        mine = exact.chunk(group.size())[group.rank()].float()
        torch.testing.assert_close(gradient.float(), mine, rtol=2**-8, atol=0)


def _check_mixed_precision(group: dist.ProcessGroup, rows: int) -> None:
    """Float32 hidden states meet a bf16 head: as bf16 ones would, and their gradient is float32."""
    narrow = Inputs.random(32, 32, TOKENS, torch.bfloat16)
    mixed = Inputs(narrow.hidden.float(), narrow.weight, narrow.targets, narrow.grad, 32)
    logps, hidden, weight = mixed.ours(group, rows)
    assert (logps.dtype, hidden.dtype, weight.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    expected, _, expected_weight = narrow.ours(group, rows)
    assert torch.equal(logps, expected)
    assert torch.equal(weight, expected_weight)
    exact = mixed.exact()[1]
    assert (hidden.double() - exact).norm() <= BF16_GRADIENT * exact.norm()


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


def _check_no_tokens(group: dist.ProcessGroup) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = Inputs.random(29, 32, 0, dtype)
        logps, hidden, weight = inputs.ours(group, 3)
        assert (logps.shape, hidden.shape) == ((0,), (0, HIDDEN))
        assert weight.shape == (32 // group.size(), HIDDEN)
        assert not weight.any()


def _check_extreme(group: dist.ProcessGroup) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 3.0], [-1e4, -1e4, -1e4, -1e4]])
    inputs = Inputs(logits, torch.eye(4), torch.tensor([1, 3]), torch.ones(2), 4)
    logps, gradient, _ = inputs.ours(group, 1)
    torch.testing.assert_close(logps, torch.tensor([-2e4, -torch.tensor(4.0).log().item()]), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1, 0, 0], [-0.25, -0.25, -0.25, 0.75]]), **F32)


def _check_bad_targets(group: dist.ProcessGroup) -> None:
    got = response_logprobs(
        torch.zeros(4, 2), torch.zeros(8, 2).chunk(group.size())[0], torch.tensor([-100, 5, 6, 8]), group, vocab_size=6
    )
    assert got.isnan().tolist() == [True, False, True, True]


def _all_formulas(group: dist.ProcessGroup) -> None:
    for vocab, padded in VOCABS:
        for rows in CHUNK_ROWS:
            _check_exactly(group, vocab, padded, rows)


def _all_cases(group: dist.ProcessGroup) -> None:
    _all_formulas(group)
    for vocab, padded in VOCABS:
        _check_rounding(group, vocab, padded, rows=3)
        _check_bf16(group, vocab, padded, rows=3)
    for rows in (3, TOKENS):
        _check_bf16_logits(group, rows)
        _check_mixed_precision(group, rows)
    _check_bf16_sum(group)
    _check_no_tokens(group)
    _check_extreme(group)
    _check_bad_targets(group)


def _run_without_megatron(rank: int) -> tuple[dict, dict]:
    # Any look at Megatron's global state needs this import, which None makes fail.
    assert not any(name.partition(".")[0] == "megatron" for name in sys.modules)
    sys.modules["megatron"] = None  # type: ignore[assignment]
    _all_cases(dist.group.WORLD)
    for rows in CHUNK_ROWS:
        _check_retained(dist.group.WORLD, rows)
        for dtype in (torch.float32, torch.bfloat16):
            _check_frozen(dist.group.WORLD, rows, dtype)
    return _measure_memory(), _count_collectives()


def _run_in_subgroups(rank: int) -> None:
    """Sizes 1, 2 and 4 out of four ranks; a member that reduced over WORLD would add a stranger's numbers."""
    sys.modules["megatron"] = None  # type: ignore[assignment]
    for size in (1, 2, 4):
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, 4, size)]
        mine = groups[rank // size]
        _all_cases(mine)
        # Subgroups hold different data and different numbers of tokens, so none may wait for another.
        inputs = Inputs.random(29, 32, 3 + rank // size, torch.float32)
        torch.testing.assert_close(inputs.ours(mine, 1)[0], inputs.exact()[0].float(), **F32)
    # Interleaved members, as a data-parallel neighbour would sit.
    evens, odds = dist.new_group([0, 2]), dist.new_group([1, 3])
    _all_formulas(odds if rank % 2 else evens)


def _run_alone(rank: int) -> None:
    """gradcheck, and that a group of one communicates nothing: it could not."""

    def refuse(*args, **kwargs):
        raise AssertionError("a group of one has nobody to talk to")

    dist.all_reduce = refuse
    group = dist.group.WORLD
    _all_cases(group)
    inputs = Inputs.random(7, 8, 5, torch.float64, columns=3)
    pair = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    for rows in (1, 2, 5):
        assert torch.autograd.gradcheck(lambda hidden, weight, n=rows: inputs.logps(hidden, weight, group, n), pair)


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


LARGE_VOCAB, FEW_COLUMNS, ROWS = 512, 2, 8


def _measure(dtype: torch.dtype) -> dict[int, Allocations]:
    """Forward and backward for so many tokens, in chunks of 8 rows: what was allocated."""
    seen = {}
    for tokens in (64, 256):
        inputs = Inputs.random(LARGE_VOCAB, LARGE_VOCAB, tokens, dtype, columns=FEW_COLUMNS)
        with Allocations() as allocations:
            inputs.ours(dist.group.WORLD, ROWS)
        seen[tokens] = allocations
    return seen


def _measure_memory() -> dict[str, dict[int, list[int]]]:
    """Bytes of allocations of at least half a chunk, by dtype and number of tokens; and where chunks are unlimited."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        half = ROWS * LARGE_VOCAB // dist.get_world_size() * dtype.itemsize
        seen = _measure(dtype)
        found[str(dtype)] = {tokens: allocations.at_least(half) for tokens, allocations in seen.items()}
    inputs = Inputs.random(LARGE_VOCAB, LARGE_VOCAB, 64, torch.float32, columns=FEW_COLUMNS)
    with Allocations() as allocations:
        inputs.ours(dist.group.WORLD, 64)
    found["one chunk"] = {64: allocations.at_least(half)}
    return found


# ------------------------------------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def measured() -> list[tuple[dict, dict]]:
    """What ranks that hold a half of the vocabulary measured, after their own checks."""
    return run_ranks(2, _run_without_megatron)


def test_subgroups_of_one_two_and_four():
    run_ranks(4, _run_in_subgroups)


def test_a_group_of_one_communicates_nothing():
    run_ranks(1, _run_alone)


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
        assert memory["torch.float32"] == {64: [4 * logits] * 2, 256: [4 * logits] * 2}
        bf16 = [2 * logits] * 2 + [4 * logits] * 2
        assert memory["torch.bfloat16"] == {64: bf16, 256: bf16}
        assert memory["one chunk"] == {64: [64 // ROWS * 4 * logits]}  # kept for backward, which overwrites it


def test_the_default_budget_is_a_few_hundred_rows_of_a_large_vocabulary():
    assert logprobs.CHUNK_BYTES // (4 * 128256) >= 500
    assert logprobs.CHUNK_BYTES // (4 * 49152) == 1365


def test_sequence_sums_by_hand():
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0], requires_grad=True)
    sums = sequence_sums(logps, torch.tensor([2, 0, 2, 0]), 4)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [-10.0, 0.0, -5.0, 0.0]
    (sums * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [3.0, 1.0, 3.0, 1.0]


def test_sequence_sums_of_nothing():
    assert sequence_sums(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 2).tolist() == [0.0, 0.0]


def test_sequence_sums_keep_what_float32_would_lose():
    logps = torch.full((3000,), -0.1)
    expected = 3000 * float(logps[0].double())
    # 3000 float64 additions of numbers up to 300: 3000 * 300 * 1.1e-16 at most.
    assert sequence_sums(logps, torch.zeros(3000, dtype=torch.int64), 1).item() == pytest.approx(expected, abs=1e-10)
