"""LoRA trainings described once for the ranks that run them and for the oracle, and what a rank wires up for one.

The package and Megatron are imported where they are used, so that the oracle's process stays light.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trajectory import ADAM, SGD, Recipe, records, write_records

STEPS = 6
"""An epoch of five global batches, and the first one again."""
EARLIER, APART = "earlier", "apart"
"""Directories of adapters that PEFT itself has saved; some runs start from the first."""
PREFIX = "base_model.model.model.layers"  # PEFT's
MODULES = {
    "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_proj": ("self_attn.o_proj",),
    "linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "linear_fc2": ("mlp.down_proj",),
}
TARGETS = {
    "attention_qkv": MODULES["linear_qkv"],
    "attention_dense": MODULES["linear_proj"],
    "mlp_fc1": MODULES["linear_fc1"],
    "mlp_fc2": MODULES["linear_fc2"],
}


@dataclass(frozen=True)
class LoraRecipe:
    """What is computed, besides how: layout, micro-batches, recomputation and overlap must not matter."""

    objective: Recipe
    rank: int = 4
    alpha: float = 8.0
    targets: tuple[str, ...] = tuple(TARGETS)
    layers: tuple[int, ...] | None = None
    row_init: str = "zero"
    reference: str = "adapters_off"
    earlier: bool = False
    dropout: float = 0.0

    def base(self, root: Path) -> Path:
        """The model that has the adapters."""
        return self.objective.folder(root) / "reference"

    def overrides(self, root: Path) -> list[str]:
        """The command line's words for it."""
        tuning = "model.peft.lora_tuning"
        layers = "null" if self.layers is None else f"[{','.join(map(str, self.layers))}]"
        return [
            *replace(self.objective, start="reference").overrides(root),
            "model.peft.peft_scheme=lora",
            f"model.peft.restore_from_path={root / EARLIER if self.earlier else 'null'}",
            f"model.kto.reference={self.reference}",
            f"{tuning}.target_modules=[{','.join(self.targets)}]",
            f"{tuning}.adapter_dim={self.rank}",
            f"{tuning}.alpha={self.alpha}",
            f"{tuning}.adapter_dropout={self.dropout}",
            f"{tuning}.row_init_method={self.row_init}",
            f"{tuning}.layer_selection={layers}",
        ]

    @property
    def starts_at_its_reference(self) -> bool:
        """Whether policy and reference are one function before the first step."""
        return self.reference == "swap" or (self.row_init == "zero" and not self.earlier)


LORA_SGD = LoraRecipe(replace(SGD, lr=0.05))
LORA_ADAM = LoraRecipe(replace(ADAM, lr=2e-3, clip=1.6), alpha=4.0)  # clips some steps and leaves others


def make_lora_files(root: Path) -> Path:
    """Base models, tied and untied, another one, and training records, under ``root``."""
    import tiny

    for name in ("untied", "tied"):
        tiny.make_model(root / name / "reference", tie_word_embeddings=name == "tied")
    tiny.make_model(root / "other", seed=1)
    write_records(root / "train.jsonl", records())
    return root


def half(layer: int, module: str, letter: str) -> str:
    """Name of a matrix in PEFT's files."""
    return f"{PREFIX}.{layer}.{module}.lora_{letter}.weight"


class LoraJob:
    """What the NeMo model wires up, without NeMo and Lightning, on a rank that has joined its job.

    Args:
        overrides: of the shipped config.
        seed: of the adapters' first numbers.
    """

    def __init__(self, overrides: list[str], *, seed: int = 1234) -> None:
        from nemo_kto import launch
        from nemo_kto.checkpoint.adapters import starting_spec
        from nemo_kto.checkpoint.weights import load_weights
        from nemo_kto.config.architecture import read_architecture
        from nemo_kto.config.load import load_config
        from nemo_kto.config.lora import check_layers
        from nemo_kto.gpt import lora
        from nemo_kto.gpt.build import build_gpt
        from nemo_kto.gpt.forward import Passes
        from nemo_kto.training.optim import build_optimizer, wrap_data_parallel
        from nemo_kto.training.step import KTOStep, loss_settings, score_size

        self.config = config = load_config(overrides)
        model = config.model
        self.base = Path(config.pretrained_checkpoint.restore_from_path)
        self.groups = launch.start(model.tensor_model_parallel_size, model.pipeline_model_parallel_size)
        self.arch = read_architecture(self.base)
        spec = starting_spec(model.peft, self.arch)
        check_layers(spec, self.arch.num_layers, self.groups.pp_size)
        self.spec = spec
        bare = build_gpt(self.arch, model, bf16=config.trainer.is_bf16, groups=self.groups)
        lora.attach(bare, spec, self.groups, dropout=model.peft.lora_tuning.adapter_dropout)
        self.chunks = wrap_data_parallel(bare, model.optim)
        load_weights(self.chunks, self.arch, self.base, self.groups)
        self._start(seed)
        self.optimizer = build_optimizer(self.chunks, model.optim, clip_grad=config.trainer.kto.gradient_clip_val)
        self.settings = loss_settings(model.kto)
        self.passes = Passes(self.chunks, self.groups, self.arch.vocab_size)
        self.step = KTOStep(self.passes, self._reference(), self.settings, self.groups, score_size(model))

    def _start(self, seed: int) -> None:
        from nemo_kto.checkpoint.adapters import load_adapters
        from nemo_kto.gpt import lora

        peft = self.config.model.peft
        if peft.restore_from_path is not None:
            load_adapters(self.chunks, self.arch, peft.restore_from_path, self.record(), self.groups)
            return
        tuning = peft.lora_tuning
        lora.initialize(
            self.chunks,
            self.groups,
            seed=seed,
            column_init=tuning.column_init_method,
            row_init=tuning.row_init_method,
        )

    def _reference(self):
        from nemo_kto.reference.adapters_off import AdaptersOffReference
        from nemo_kto.reference.columns import ReferenceColumns
        from nemo_kto.reference.host_weights import HostWeights
        from nemo_kto.reference.swap import SwapReference, WeightSwap
        from nemo_kto.training.step import score_size

        needs_kl = self.settings.needs_kl
        if self.config.model.kto.reference == "swap":
            self.swap = WeightSwap(self.chunks, HostWeights(self.chunks))
            scorer = SwapReference(self.swap, self.passes)
        else:
            scorer = AdaptersOffReference(self.chunks, self.passes)
        return ReferenceColumns(scorer, size=score_size(self.config.model), needs_kl=needs_kl)

    def record(self, base: Path | None = None):
        """What a checkpoint of the adapters says of itself; of ``base`` instead of the job's own."""
        from nemo_kto.checkpoint.base_identity import base_identity
        from nemo_kto.config.adapter_record import AdapterRecord

        base = base or self.base
        return AdapterRecord(self.spec, str(base), base_identity(base))

    def batches(self, first: int = 0) -> Iterator[Any]:
        """This rank's share of the global batches from number ``first`` on."""
        from nemo_kto.data.tokenize import build_store
        from nemo_kto.training.run_data import RunData

        data = self.config.model.data
        run = RunData(self.config, build_store(data.data_prefix.train, self.base, data), None, self.arch)
        return islice(run.train_loader(0, dp_rank=self.groups.dp_rank, dp_size=self.groups.dp_size), first, None)

    def train(self, batch: Any, look: Callable[[], None] = lambda: None) -> dict:
        """One optimizer step, and its line of metrics. ``look`` is called when gradients are there."""
        from nemo_kto.training.metrics import named_means
        from nemo_kto.training.optim import set_learning_rate

        optim = self.config.model.optim
        set_learning_rate(self.optimizer, optim.lr, optim.weight_decay)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self.step.train(batch)
        look()
        _, norm, _ = self.optimizer.step()
        return {**named_means(sums, batch.counts, self.settings.beta), "grad_norm": float(norm)}

    def whole(self, pick: Callable[[Tensor], Tensor] = lambda parameter: parameter) -> dict[str, Tensor]:
        """``pick`` of every adapter of this pipeline stage, under PEFT's names, joined over TP."""
        from nemo_kto.gpt.live import parameters_settled
        from nemo_kto.gpt.lora import low_ranks

        found: dict[str, Tensor] = {}
        with parameters_settled(self.chunks):  # overlapped gathers may be pending
            for layer, linear, adapter in low_ranks(self.chunks):
                a, b = (self._gathered(pick(parameter)) for parameter in (adapter.a, adapter.b))
                if adapter.is_row:
                    a, b = [torch.cat(a, dim=1)], [_one(b)]
                else:
                    a, b = [_one(a)], self._by_module(layer, linear, b)
                for number, module in enumerate(MODULES[linear]):
                    found[half(layer, module, "A")] = a[0]
                    found[half(layer, module, "B")] = b[number]
        return found

    def _gathered(self, shard: Tensor) -> list[Tensor]:
        shard = shard.detach().contiguous()
        shards = [torch.empty_like(shard) for _ in range(self.groups.tp_size)]
        torch.distributed.all_gather(shards, shard, group=self.groups.tp)
        return shards

    def _by_module(self, layer: int, linear: str, shards: list[Tensor]) -> list[Tensor]:
        """Rows of a fused layer as those of the modules it is made of, by the rules of the layer's own weight."""
        from nemo_kto.checkpoint import hf_names

        parent = "self_attention" if linear == "linear_qkv" else "mlp"
        rule = hf_names.rule_for(self.arch, f"decoder.layers.{layer}.{parent}.{linear}.weight")
        parts = [hf_names.split(rule, self.arch, shard) for shard in shards]
        return [torch.cat(part) for part in zip(*parts, strict=True)]


def _one(replicas: list[Tensor]) -> Tensor:
    assert all(torch.equal(replicas[0], other) for other in replicas), "a replicated half differs over TP"
    return replicas[0].clone()
