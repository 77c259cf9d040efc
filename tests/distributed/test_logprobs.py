"""Vocab-parallel log-probabilities, value and gradient, against torch's log_softmax over the full vocabulary."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import Tensor

from nemo_kto.distributed.logprobs import response_logprobs, sequence_sums, vocab_parallel_logprobs

pytestmark = pytest.mark.distributed

HIDDEN, TOKENS = 16, 7
VOCABS = [(32, 32), (29, 32), (17, 32), (8, 32)]
"""(real, padded): even, uneven, and with ranks that hold padding alone (8 of 32 columns over 4 ranks leaves three)."""

# The shards compute in float32 what torch does, but add exponentials in another order: a few ulp of numbers near 10.
F32 = {"rtol": 2e-6, "atol": 2e-6}
# A bf16 gradient carries 8 bits; ours is rounded once from float32, so half an ulp, 2^-9 relative, is the whole error.
BF16 = {"rtol": 2**-8, "atol": 1e-6}


def _tensors(vocab: int, padded: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, padded weight, targets and the gradient that arrives; the same on every rank."""
    generator = torch.Generator().manual_seed(vocab + tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    weight = torch.randn(padded, HIDDEN, generator=generator)
    weight[vocab:] = 50.0  # padding that would win the maximum if it were looked at
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    if tokens > 1:
        targets[0], targets[1] = 0, vocab - 1
    return hidden.to(dtype), weight.to(dtype), targets, torch.randn(tokens, generator=generator)


def _shard(full: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    return full.chunk(group.size(), dim=dim)[group.rank()].clone().requires_grad_()


def _check_logits(group: dist.ProcessGroup, vocab: int, padded: int, dtype: torch.dtype) -> None:
    hidden, weight, targets, grad = _tensors(vocab, padded, TOKENS, dtype)
    logits = hidden @ weight.t()
    full = logits[:, :vocab].float().requires_grad_()
    expected = torch.log_softmax(full, dim=1).gather(1, targets[:, None]).squeeze(1)
    (full_grad,) = torch.autograd.grad(expected, full, grad)

    shard = _shard(logits, group, dim=1)
    before = shard.detach().clone()
    got = vocab_parallel_logprobs(shard, targets, group, vocab_size=vocab)
    (shard_grad,) = torch.autograd.grad(got, shard, grad)
    assert got.dtype == torch.float32
    assert shard_grad.dtype == dtype
    assert torch.equal(shard, before)
    torch.testing.assert_close(got, expected, **F32)
    padding = torch.zeros(TOKENS, padded - vocab)
    mine = torch.cat([full_grad, padding], dim=1).chunk(group.size(), dim=1)[group.rank()]
    torch.testing.assert_close(shard_grad.float(), mine, **(F32 if dtype == torch.float32 else BF16))
    first = group.rank() * shard.shape[1]
    assert not shard_grad[:, max(0, vocab - first) :].any()


def _check_hidden(group: dist.ProcessGroup, vocab: int, padded: int) -> None:
    """Gradients of hidden (all-reduced) and weight (local), through the projection."""
    hidden, weight, targets, grad = _tensors(vocab, padded, TOKENS, torch.float32)
    full_hidden, full_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = (full_hidden @ full_weight.t())[:, :vocab]
    expected = torch.log_softmax(logits, dim=1).gather(1, targets[:, None]).squeeze(1)
    hidden_grad, weight_grad = torch.autograd.grad(expected, [full_hidden, full_weight], grad)

    shard = _shard(weight, group, dim=0)
    mine = hidden.clone().requires_grad_()
    got = response_logprobs(mine, shard, targets, group, vocab_size=vocab)
    got_hidden, got_weight = torch.autograd.grad(got, [mine, shard], grad)
    torch.testing.assert_close(got, expected, **F32)
    # Sums of about 30 products of order 1 in another order, hence a larger absolute term.
    torch.testing.assert_close(got_hidden, hidden_grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_weight, weight_grad.chunk(group.size())[group.rank()], rtol=1e-5, atol=1e-5)


def _check_mixed_precision(group: dist.ProcessGroup) -> None:
    """Float32 hidden states meet a bf16 head: bf16 projection, float32 result, gradients in their owners' dtypes."""
    hidden, weight, targets, grad = _tensors(32, 32, TOKENS, torch.bfloat16)
    shard, mine = _shard(weight, group, dim=0), hidden.float().requires_grad_()
    got = response_logprobs(mine, shard, targets, group, vocab_size=32)
    expected = torch.log_softmax((hidden @ weight.t()).float(), dim=1).gather(1, targets[:, None]).squeeze(1)
    got_hidden, got_weight = torch.autograd.grad(got, [mine, shard], grad)
    assert (got.dtype, got_hidden.dtype, got_weight.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    # The bf16 product may round a logit of order 10 to the neighbouring bf16 number when its shape changes.
    torch.testing.assert_close(got, expected, rtol=0, atol=2**-4)


def _check_no_tokens(group: dist.ProcessGroup) -> None:
    hidden, weight, targets, grad = _tensors(29, 32, 0, torch.float32)
    shard, mine = _shard(weight, group, dim=0), hidden.clone().requires_grad_()
    got = response_logprobs(mine, shard, targets, group, vocab_size=29)
    got_hidden, got_weight = torch.autograd.grad(got, [mine, shard], grad)
    assert (got.shape, got_hidden.shape) == ((0,), (0, HIDDEN))
    assert not got_weight.any()


def _check_extreme(group: dist.ProcessGroup) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 3.0], [-1e4, -1e4, -1e4, -1e4]])
    shard = _shard(logits, group, dim=1)
    got = vocab_parallel_logprobs(shard, torch.tensor([1, 3]), group, vocab_size=4)
    torch.testing.assert_close(got, torch.tensor([-2e4, -torch.tensor(4.0).log().item()]), **F32)
    (grad,) = torch.autograd.grad(got.sum(), shard)
    assert bool(torch.isfinite(grad).all())


def _check_bad_targets(group: dist.ProcessGroup) -> None:
    got = vocab_parallel_logprobs(
        _shard(torch.zeros(4, 8), group, 1), torch.tensor([-100, 5, 6, 8]), group, vocab_size=6
    )
    assert got.isnan().tolist() == [True, False, True, True]


def _all_cases(group: dist.ProcessGroup) -> None:
    for vocab, padded in VOCABS:
        _check_hidden(group, vocab, padded)
        for dtype in (torch.float32, torch.bfloat16):
            _check_logits(group, vocab, padded, dtype)
    _check_mixed_precision(group)
    _check_no_tokens(group)
    _check_extreme(group)
    _check_bad_targets(group)


def _run_without_megatron(rank: int) -> int:
    # Any look at Megatron's global state needs this import, which None makes fail.
    assert not any(name.partition(".")[0] == "megatron" for name in sys.modules)
    sys.modules["megatron"] = None  # type: ignore[assignment]
    _all_cases(dist.group.WORLD)
    return rank


def _run_in_subgroups(rank: int) -> None:
    """Sizes 1, 2 and 4 out of four ranks; a member that reduced over WORLD would add a stranger's numbers."""
    sys.modules["megatron"] = None  # type: ignore[assignment]
    for size in (1, 2, 4):
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, 4, size)]
        mine = groups[rank // size]
        _all_cases(mine)
        # Subgroups hold different data and different numbers of tokens, so none may wait for another.
        hidden, weight, targets, _ = _tensors(29, 32, 3 + rank // size, torch.float32)
        got = response_logprobs(hidden, _shard(weight, mine, 0), targets, mine, vocab_size=29)
        expected = torch.log_softmax((hidden @ weight.t())[:, :29], dim=1).gather(1, targets[:, None]).squeeze(1)
        torch.testing.assert_close(got, expected, **F32)
    # Interleaved members, as a data-parallel neighbour would sit.
    evens, odds = dist.new_group([0, 2]), dist.new_group([1, 3])
    _all_cases(odds if rank % 2 else evens)


def _count_collectives_of_one(rank: int) -> list[str]:
    called: list[str] = []
    dist.all_reduce = lambda *args, **kwargs: called.append("all_reduce")
    _all_cases(dist.group.WORLD)
    return called


def test_tensor_parallel_two():
    assert run_ranks(2, _run_without_megatron) == [0, 1]


def test_subgroups_of_one_two_and_four():
    run_ranks(4, _run_in_subgroups)


def test_a_group_of_one_communicates_nothing():
    assert run_ranks(1, _count_collectives_of_one) == [[]]


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
