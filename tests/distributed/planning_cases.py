"""What ranks really hold: the product's network and optimizer, built for a layout, after one optimizer step.

Bytes are those of storages, each once, whatever views there are on them.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import training_kit as kit

ROWS, LENGTH, MICRO_BATCHES = 2, 64, 4


@dataclass(frozen=True)
class Case:
    """A layout and what is trained in it."""

    tp: int = 1
    pp: int = 1
    bf16: bool = True
    optimizer: str = "adamw"
    lora_dim: int | None = None
    sequence_parallel: bool = False
    recompute: str | None = None
    recompute_layers: int = 0
    model: str = "untied"


def measure(case: Case, root: Path) -> dict[str, Any]:
    """Bytes of this rank by what they are for, and its place in the pipeline."""
    gc.collect()
    earlier = _alive()  # held, so that no address among them is given to another
    before = storages(earlier)
    trainer = _Trainer(case, root / case.model)
    activations = trainer.step()
    weights = storages(p.detach() for p in trainer.parameters)
    gradients = storages(p.main_grad for p in trainer.parameters if p.requires_grad)
    optimizer = storages(trainer.optimizer_tensors())
    for known in (weights, gradients):
        optimizer = {key: size for key, size in optimizer.items() if key not in known}
    gc.collect()
    everything = storages(_alive())
    return {
        "stage": trainer.groups.pp_rank,
        "dp": trainer.groups.dp_size,
        "parameters": sum(p.numel() for p in trainer.parameters),
        "trained": sum(p.numel() for p in trainer.parameters if p.requires_grad),
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(optimizer.values()),
        "everything": sum(size for key, size in everything.items() if key not in before),
        "activations": activations,
    }


class _Trainer:
    def __init__(self, case: Case, hf_dir: Path) -> None:
        from nemo_kto import cpu_backend, launch

        cpu_backend.install()  # before anything imports Megatron
        from nemo_kto.checkpoint.weights import load_weights
        from nemo_kto.config.architecture import read_architecture
        from nemo_kto.config.lora import LINEARS, LoraSpec
        from nemo_kto.gpt import lora
        from nemo_kto.gpt.build import PlainNetwork, build_gpt
        from nemo_kto.gpt.forward import Passes
        from nemo_kto.training.optim import build_optimizer, wrap_data_parallel

        arch = read_architecture(hf_dir)
        self.groups = groups = launch.start(case.tp, case.pp, seed=7)
        network = PlainNetwork(
            sequence_parallel=case.sequence_parallel,
            activations_checkpoint_granularity="full" if case.recompute else None,
            activations_checkpoint_method=case.recompute,
            activations_checkpoint_num_layers=case.recompute_layers or None,
        )
        chunks = build_gpt(arch, network, bf16=case.bf16, groups=groups)
        if case.lora_dim is not None:
            spec = LoraSpec(case.lora_dim, dict.fromkeys(LINEARS.values(), case.lora_dim), 1.0)
            lora.attach(chunks, spec, groups)
            lora.initialize(chunks, groups, seed=7, column_init="xavier", row_init="normal")
        optim = kit._optim(kit.Setup(optimizer=case.optimizer))
        self.chunks = wrap_data_parallel(chunks, optim)
        load_weights(self.chunks, arch, hf_dir, groups)
        self.optimizer = build_optimizer(self.chunks, optim, clip_grad=1.0)
        self.passes = Passes(self.chunks, groups, arch.vocab_size)
        self.parameters = [p for chunk in self.chunks for p in chunk.parameters()]
        self.vocab_size = arch.vocab_size

    def step(self) -> int:
        """One optimizer step; bytes of activations at their highest."""
        from nemo_kto.training.optim import LightningMegatronOptimizer, set_learning_rate

        set_learning_rate(self.optimizer, 1e-3, 0.0)
        held = Held(storages(p.detach() for p in self.parameters))
        with held:
            self.passes.train(self._batches(), lambda logps, _: (logps.sum() / 1e3, {}))
        LightningMegatronOptimizer(self.optimizer, self.chunks).step()
        return held.peak

    def _batches(self) -> list[Any]:
        from nemo_kto.data.batch import KTOBatch, Rows

        generator = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(MICRO_BATCHES):
            tokens = torch.randint(3, self.vocab_size, (ROWS, LENGTH), generator=generator)
            rows = Rows(tokens, tokens.roll(-1, dims=1))
            batches.append(KTOBatch(rows, rows, torch.ones(ROWS).bool(), torch.ones(ROWS).bool(), torch.arange(ROWS)))
        return batches

    def optimizer_tensors(self) -> Iterable[torch.Tensor]:
        """Masters, moments, and gradients of masters."""
        from nemo_kto.training.update import parts

        for part in parts(self.optimizer):
            for group in part.optimizer.param_groups:
                for master in group["params"]:
                    yield master.detach()
                    if master.grad is not None:
                        yield master.grad
                    yield from (v for v in part.optimizer.state[master].values() if isinstance(v, torch.Tensor))


class Held(torch.autograd.graph.saved_tensors_hooks):
    """Counts the storages that backward still needs, parameters left out, while the block lasts."""

    def __init__(self, without: dict[int, int]) -> None:
        super().__init__(self._pack, lambda box: box.tensor)
        self._without, self._count, self._bytes, self.peak = without, {}, 0, 0

    def _pack(self, tensor: torch.Tensor) -> _Box:
        box, storage = _Box(tensor), tensor.untyped_storage()
        key = storage._cdata
        if key not in self._without:
            if not self._count.get(key):
                self._bytes += storage.nbytes()
                self.peak = max(self.peak, self._bytes)
            self._count[key] = self._count.get(key, 0) + 1
            weakref.finalize(box, self._free, key, storage.nbytes())
        return box

    def _free(self, key: int, size: int) -> None:
        self._count[key] -= 1
        if not self._count[key]:
            self._bytes -= size


class _Box:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes by storage."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in found}


def _alive() -> list[torch.Tensor]:
    return [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
