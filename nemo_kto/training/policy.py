"""The policy and its reference, from config to live weights. Trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from nemo_kto.checkpoint.adapters import load_adapters, starting_spec
from nemo_kto.checkpoint.base_identity import base_identity
from nemo_kto.checkpoint.run_reference import RunReference
from nemo_kto.checkpoint.saving import Contents
from nemo_kto.checkpoint.sharded import Part
from nemo_kto.checkpoint.weights import load_weights
from nemo_kto.config.adapter_record import FILE, AdapterRecord, holds_adapters, read_record
from nemo_kto.config.architecture import read_architecture
from nemo_kto.config.locate import hf_side, resume_path
from nemo_kto.config.lora import LoraSpec, check_layers, reference_mode
from nemo_kto.config.schema import Config
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.gpt import lora
from nemo_kto.gpt.build import build_gpt
from nemo_kto.gpt.forward import Passes
from nemo_kto.reference.adapters_off import AdaptersOffReference
from nemo_kto.reference.base import Reference
from nemo_kto.reference.columns import ReferenceColumns
from nemo_kto.reference.host_weights import HostWeights
from nemo_kto.reference.swap import SwapReference, WeightSwap
from nemo_kto.training.optim import wrap_data_parallel
from nemo_kto.training.step import loss_settings, score_size


@dataclass(frozen=True)
class Policy:
    """A network that is to be trained or validated, and what it is held to.

    Attributes:
        chunks: model chunks of this rank; wrapped in DDP where they are trained.
        passes: their passes.
        reference: adds log-probs of the reference policy to a batch.
        swap: how the reference gets in and out, where it is swapped.
        identity: what a resumed run's reference must be; None where the run keeps nothing.
        contents: what its checkpoints hold besides optimizer and counters.
    """

    chunks: nn.ModuleList
    passes: Passes
    reference: ReferenceColumns
    swap: WeightSwap | None
    identity: str | None
    contents: Contents

    @property
    def bytes_moved(self) -> int:
        """Bytes that the reference has moved between host and device since the start, on this rank."""
        return 0 if self.swap is None else self.swap.bytes_moved


class PolicyBuilder:
    """Builds the policy of a run on this rank. All ranks call it together.

    Args:
        run: the run.
        groups: the layout.
        fitting: whether the run trains; otherwise it only validates, and keeps nothing.
    """

    def __init__(self, run: Config, groups: ParallelGroups, *, fitting: bool) -> None:
        self._run, self._groups, self._fitting = run, groups, fitting
        self._start = run.pretrained_checkpoint.restore_from_path
        self._hf_side = hf_side(self._start)
        self._arch = read_architecture(self._hf_side)
        self._resume = resume_path(run.exp_manager) if fitting else None

    def build(self) -> Policy:
        """The network, its reference, and the weights it starts from; on resume, Lightning loads others over them.

        Raises:
            CheckpointError: weights, adapters or the kept reference cannot be read, or are not the run's.
            ConfigError: the layout does not fit, or the adapters are not those of the config.
        """
        spec = starting_spec(self._run.model.peft, self._arch)
        return self._full() if spec is None else self._adapted(spec)

    def _network(self, spec: LoraSpec | None = None) -> nn.ModuleList:
        model = self._run.model
        chunks: Sequence[nn.Module] = build_gpt(self._arch, model, bf16=self._run.trainer.is_bf16, groups=self._groups)
        if spec is not None:
            check_layers(spec, self._arch.num_layers, self._groups.pp_size)
            lora.attach(chunks, spec, self._groups, dropout=model.peft.lora_tuning.adapter_dropout)
        return nn.ModuleList(wrap_data_parallel(chunks, model.optim) if self._fitting else chunks)

    def _full(self) -> Policy:
        """The reference is loaded first and captured; where the policy starts elsewhere its weights then follow."""
        chunks = self._network()
        source = self._run.model.kto.reference_from_path
        contents = Contents(self._hf_side)
        identity = self._settle(
            chunks,
            f"model.kto.reference_from_path={source}",
            partial(load_weights, chunks, self._arch, source, self._groups),
            contents,
        )
        swap = self._swap(chunks)
        if source != self._start:
            load_weights(chunks, self._arch, self._start, self._groups)
        return self._policy(chunks, swap, identity, contents)

    def _adapted(self, spec: LoraSpec) -> Policy:
        """The base's weights never change. The reference is the base, or base and the adapters of the start."""
        model = self._run.model
        chunks = self._network(spec)
        record = AdapterRecord(spec, self._start, base_identity(self._start))
        if self._resume is not None and holds_adapters(self._resume) and not self._run.exp_manager.resume_with_changes:
            read_record(self._resume).check_base(self._start, record.base_sha256, self._resume)
        load_weights(chunks, self._arch, self._start, self._groups)
        contents = Contents(self._hf_side, documents={FILE: record.to_json()}, part=Part.ADAPTERS)
        load = partial(self._load_adapters, chunks, record)
        if reference_mode(model) == "adapters_off":
            load()
            return self._policy(chunks, None, record.base_sha256, contents)
        source = f"model.peft.restore_from_path={model.peft.restore_from_path}"
        identity = self._settle(chunks, source, load, contents)
        return self._policy(chunks, self._swap(chunks), identity, contents)

    def _load_adapters(self, chunks: nn.ModuleList, record: AdapterRecord) -> None:
        model = self._run.model
        if model.peft.restore_from_path is not None:
            load_adapters(chunks, self._arch, model.peft.restore_from_path, record, self._groups)
            return
        tuning = model.peft.lora_tuning
        lora.initialize(
            chunks,
            self._groups,
            seed=model.seed,
            column_init=tuning.column_init_method,
            row_init=tuning.row_init_method,
        )

    def _settle(self, chunks: nn.ModuleList, source: str, load: Callable[[], None], contents: Contents) -> str | None:
        """Fill the live parameters with the reference, which a run keeps from its start on."""
        exp = self._run.exp_manager
        return RunReference(Path(exp.explicit_log_dir), source, load, contents).settle(
            chunks,
            self._groups,
            resume_from=self._resume,
            may_differ=exp.resume_with_changes,
            keep=self._fitting and exp.create_checkpoint_callback,
        )

    def _swap(self, chunks: nn.ModuleList) -> WeightSwap:
        """With the live weights as the reference's."""
        return WeightSwap(chunks, HostWeights(chunks), self._run.model.kto.reference_restore)

    def _policy(
        self, chunks: nn.ModuleList, swap: WeightSwap | None, identity: str | None, contents: Contents
    ) -> Policy:
        kto = self._run.model.kto
        passes = Passes(chunks, self._groups, self._arch.vocab_size)
        needs_kl = loss_settings(kto).needs_kl
        reference: Reference = AdaptersOffReference(chunks, passes) if swap is None else SwapReference(swap, passes)
        columns = ReferenceColumns(reference, size=score_size(self._run.model), needs_kl=needs_kl)
        return Policy(chunks, passes, columns, swap, identity, contents)
