"""The swap on CUDA: pinned host memory, a stream of its own, and its order with what runs on the current stream."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "distributed"))

import training_kit as kit
from toy_network import toy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SLEEP_CYCLES = 200_000_000
"""About 0.1 s of a busy GPU: long against the microseconds it takes to queue a copy."""


def _network(dtype: torch.dtype) -> torch.nn.Module:
    """64 MiB or 128 MiB of random weights: copies that take milliseconds."""
    return toy(*[torch.nn.Linear(4096, 4096, bias=False) for _ in range(2)]).to("cuda", dtype)


def _copy(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def _equal(module: torch.nn.Module, tensors: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, t) for p, t in zip(module.parameters(), tensors, strict=True))


@pytest.fixture(params=["host", "device"])
def way(request):
    """Where the policy waits."""
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def swap(request, way):
    """A module, its first weights, and a swap whose reference they are."""
    from nemo_kto.reference.host_weights import HostWeights
    from nemo_kto.reference.swap import WeightSwap

    module = _network(request.param)
    return module, _copy(module), WeightSwap([module], HostWeights([module]), way)


def _change(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)


def test_the_host_copy_is_one_pinned_buffer_and_uses_a_stream_of_its_own(swap):
    _, _, weights = swap
    assert [buffer.is_pinned() for buffer in weights.reference._buffers.values()] == [True]
    assert weights.reference._stream not in (None, torch.cuda.current_stream(), torch.cuda.default_stream())


def test_both_policies_are_bit_for_bit_and_in_place(swap, way):
    module, reference, weights = swap
    _change(module)
    policy, pointers = _copy(module), [p.data_ptr() for p in module.parameters()]
    for _ in range(3):
        with weights.swapped():
            assert _equal(module, reference)
        assert _equal(module, policy)
    assert pointers == [p.data_ptr() for p in module.parameters()]
    copies = 3 * {"host": 3, "device": 1}[way]
    assert weights.bytes_moved == copies * sum(p.nbytes for p in module.parameters())


def test_a_second_copy_is_there_for_the_time_of_the_swap_only(swap, way):
    module, _, weights = swap
    before = torch.cuda.memory_allocated()
    with weights.swapped():
        inside = torch.cuda.memory_allocated()
    size = sum(p.nbytes for p in module.parameters())
    assert inside - before == (size if way == "device" else 0)
    assert torch.cuda.memory_allocated() == before


def test_free_memory_counts_what_torch_holds_and_does_not_use():
    from nemo_kto.reference.keeping import free_bytes

    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    before, total = free_bytes(device)
    tensor = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert before - free_bytes(device)[0] >= 2**28
    del tensor  # to torch's cache
    assert abs(before - free_bytes(device)[0]) < 2**28 // 8, "others may use the device as well"
    assert before < total


def test_the_policy_is_saved_after_the_update_that_is_still_queued(swap):
    module, reference, weights = swap
    torch.cuda._sleep(SLEEP_CYCLES)
    _change(module)  # queued behind the sleep
    with weights.swapped():
        pass
    assert _equal(module, [t + 1.0 for t in reference])


def test_work_queued_after_the_swap_sees_the_reference(swap):
    module, reference, weights = swap
    _change(module)
    with weights.swapped():
        inside = _copy(module)  # queued at once, on the current stream
    assert all(torch.equal(a, b) for a, b in zip(inside, reference, strict=True))


def test_scoring_that_is_still_queued_reads_the_reference(swap):
    """The policy must not come back under a kernel that has not run yet."""
    module, reference, weights = swap
    _change(module)
    with weights.swapped():
        torch.cuda._sleep(SLEEP_CYCLES)
        inside = _copy(module)
    assert all(torch.equal(a, b) for a, b in zip(inside, reference, strict=True))


def test_another_current_stream(swap):
    module, reference, weights = swap
    with torch.cuda.stream(torch.cuda.Stream()):
        _change(module)
        policy = _copy(module)
        with weights.swapped():
            inside = _copy(module)
        outside = _copy(module)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(inside, reference, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(outside, policy, strict=True))


@pytest.mark.parametrize(
    ("bf16", "restore"), [(False, "auto"), (False, "host"), (True, "auto"), (True, "masters"), (True, "host")]
)
def test_megatron_run(bf16, restore, tmp_path):
    """Wrapper, sharded optimizer and steps on one GPU over NCCL: the policy comes back, the reference stays."""
    from nemo_kto import launch

    policy = tiny.make_model(tmp_path / "policy", **kit.SIZES)
    reference = tiny.make_model(tmp_path / "reference", seed=1, **kit.SIZES)
    try:
        run = kit.Run(kit.Setup(optimizer="distributed_fused_adam", bf16=bf16, restore=restore), policy, reference)
        digest = run.swap.reference.digest()
        run.train(3)
        before, state = run.weights(), run.optimizer_state()
        run.reference.score(kit.batch(9, run.groups))
        assert run.swap._latest == {"auto": "device"}.get(restore, restore)
        assert kit.same(run.weights(), before)
        assert kit.same(run.optimizer_state(), state)
        assert run.swap.reference.digest() == digest
    finally:
        launch.shutdown()
