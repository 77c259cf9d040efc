"""The chunked, vocab-parallel head, value and gradients, against float64's log_softmax over the full vocabulary."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from head_inputs import CHUNK_ROWS, HIDDEN, TOKENS, Inputs

from nemo_kto.distributed.logprobs import response_logprobs, sequence_sums

pytestmark = pytest.mark.distributed

VOCABS = [(32, 32), (29, 32), (17, 32), (8, 32)]
"""(real, padded): even, uneven, and with ranks that hold padding alone (8 of 32 columns over 4 ranks leaves three)."""

F64 = {"rtol": 1e-12, "atol": 1e-12}
# Logits are below 32, where float32 is 2^-20 = 1e-6 from the truth: in the product, the two differences, the result.
F32 = {"rtol": 0, "atol": 4e-6}
# Sums of about 30 products of order 1.
F32_GRADIENT = {"rtol": 1e-5, "atol": 1e-5}
# Half a unit in the last place of a bf16 logit below 32 is 2^-4, the target's and those of the log-sum together twice.
BF16 = {"rtol": 0, "atol": 2**-3}
# Of a whole gradient: softmax is off by a logit's 2^-4 at most and by a fourth of that on average (most are below 8).
BF16_GRADIENT = 2**-5


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


def _run_in_subgroups(rank: int) -> None:
    """Sizes 1, 2 and 4 out of four ranks; a member that reduced over WORLD would add a stranger's numbers."""
    # Any look at Megatron's global state needs this import, which None makes fail.
    assert not any(name.partition(".")[0] == "megatron" for name in sys.modules)
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


# ------------------------------------------------------------------------------------------------ tests


def test_subgroups_of_one_two_and_four():
    run_ranks(4, _run_in_subgroups)


def test_a_group_of_one_communicates_nothing():
    run_ranks(1, _run_alone)


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
