"""Copies of weights in host memory: everything, in place, bit for bit, in as few pieces as memory allows."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from nemo_kto.reference.host_weights import HostWeights


def _view(buffer: torch.Tensor, start: int, *shape: int) -> nn.Parameter:
    """A parameter that is a part of a buffer, as Megatron's wrapper makes them."""
    size = torch.Size(shape).numel()
    return nn.Parameter(buffer[start : start + size].view(shape))


class Scattered(nn.Module):
    """Float32 parameters in a buffer, in reverse order and with a gap, and others of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer, self.other = torch.randn(40), torch.randn(8)
        self.last = _view(self.buffer, 34, 6)  # behind a gap of two
        self.second = _view(self.buffer, 12, 4, 5)
        self.first = _view(self.buffer, 0, 3, 4)
        self.rounded = nn.Parameter(torch.randn(7).bfloat16())
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.turned = nn.Parameter(torch.randn(3, 5).t())
        self.elsewhere = _view(self.other, 0, 8)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _values(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def _same(module: nn.Module, values: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, v) for p, v in zip(module.parameters(), values, strict=True))


def test_restores_everything_that_is_trained_in_place():
    module = Scattered()
    reference, gap = _values(module), module.buffer[32:34].clone()
    reference_of_trained = [p.detach().clone() for p in _trained(module)]
    weights = HostWeights([module])
    pointers = [p.data_ptr() for p in module.parameters()]
    with torch.no_grad():
        for parameter in _trained(module):
            parameter.add_(1.0)
        module.buffer[32:34] = 7.0
    weights.restore()
    assert _same(module, reference)
    assert module.buffer[32:34].tolist() == [7.0, 7.0] != gap.tolist(), "the gap is nobody's"
    assert pointers == [p.data_ptr() for p in module.parameters()]
    weights.capture()
    with torch.no_grad():
        for parameter in _trained(module):
            parameter.copy_(torch.zeros_like(parameter))
        module.frozen.fill_(5.0)
    weights.restore()
    assert module.frozen.tolist() == [5.0] * 3, "what is not trained is left alone"
    assert all(torch.equal(p, v) for p, v in zip(_trained(module), reference_of_trained, strict=True))


def test_one_buffer_per_dtype_and_one_copy_for_what_lies_side_by_side():
    weights = HostWeights([Scattered()])
    assert {dtype: buffer.numel() for dtype, buffer in weights._buffers.items()} == {
        torch.float32: 12 + 20 + 6 + 15 + 8,
        torch.bfloat16: 7,
    }
    assert weights.num_bytes == 4 * 61 + 2 * 7
    sizes = sorted(live.numel() for live, _ in weights._runs())
    assert sizes == [6, 7, 8, 15, 32], "first and second touch, the others do not"


def test_parameters_that_have_moved_are_found_where_they_are():
    """Nothing here rebinds ``.data``, but whoever does must not have half of a copy go to where it was."""
    module = Scattered()
    weights, reference = HostWeights([module]), _values(module)
    module.second.data = torch.zeros(4, 5)
    weights.restore()
    assert _same(module, reference)


def test_the_digest_is_of_the_values_in_parameter_order():
    module = Scattered()
    raw = b"".join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in _trained(module))
    assert HostWeights([module]).digest() == hashlib.sha256(raw).hexdigest()


def test_a_rank_without_trained_parameters_has_nothing_to_copy():
    weights = HostWeights([nn.Linear(2, 2).requires_grad_(False)])
    weights.capture()
    weights.restore()
    assert weights.num_bytes == 0
