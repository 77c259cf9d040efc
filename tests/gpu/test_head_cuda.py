"""The LM head on CUDA: bf16 products that add to a float32 sum, and the memory that the allocator really took."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nemo_kto.distributed.logprobs import CHUNK_BYTES, response_logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

VOCAB, HIDDEN, TOKENS = 8192, 256, 512


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory):
    """A group of one, which communicates nothing, so gloo does."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def _inputs(tokens: int, vocab: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, hidden, device="cuda").div_(hidden**0.5).to(dtype).requires_grad_()
    return states, weight, torch.randint(0, vocab, (tokens,), device="cuda")


@pytest.mark.parametrize("rows", [TOKENS, TOKENS // 8, 24])
def test_bf16_gradients_against_float64(alone, rows: int) -> None:
    hidden, weight, targets = _inputs(TOKENS, VOCAB, HIDDEN, torch.bfloat16)
    logps = response_logprobs(hidden, weight, targets, alone, vocab_size=VOCAB, chunk_bytes=4 * VOCAB * rows)
    ours = torch.autograd.grad(logps.sum(), [hidden, weight])
    exact_hidden, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    exact = torch.log_softmax(exact_hidden @ exact_weight.t(), dim=1).gather(1, targets[:, None]).squeeze(1)
    wanted = torch.autograd.grad(exact.sum(), [exact_hidden, exact_weight])
    # Logits stay below 8, where half a unit in the last place of a bf16 number is 2^-7: the target's and the sum's.
    torch.testing.assert_close(logps.double(), exact, rtol=0, atol=2**-6)
    for got, want in zip(ours, wanted, strict=True):
        assert (got.double() - want).norm() <= 2**-6 * want.norm()


def test_memory_is_a_chunks_and_the_gradients(alone) -> None:
    """A vocabulary of 128k: 2048 and 8192 tokens take the same, but for what is as large as the hidden states."""
    vocab, columns = 128 * 1024, 1024
    taken = {}
    for tokens in (2048, 2048, 8192):  # the first call of all also takes work space that the library keeps
        hidden, weight, targets = _inputs(tokens, vocab, columns, torch.bfloat16)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        logps = response_logprobs(hidden, weight, targets, alone, vocab_size=vocab)
        torch.autograd.grad(logps.sum(), [hidden, weight])
        # the gradient of hidden, and some numbers for each row
        taken[tokens] = torch.cuda.max_memory_allocated() - before - 2 * tokens * columns - 100 * tokens
    head = vocab * columns
    for num_bytes in taken.values():
        # logits in float32 and bf16; the head's gradient in float32 and bf16; products' work space
        assert num_bytes <= 1.5 * CHUNK_BYTES + 6 * head + 64 * 2**20
    assert abs(taken[8192] - taken[2048]) <= 16 * 2**20
