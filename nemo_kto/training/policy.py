"""The policy and its reference, from config to live weights. Trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from nemo_kto.checkpoint.adapters import load_adapters, starting_spec
from nemo_kto.checkpoint.base_identity import base_identity
from nemo_kto.checkpoint.run_reference import RunReference, Settled
from nemo_kto.checkpoint.saving import Contents
from nemo_kto.checkpoint.sharded import Part
from nemo_kto.checkpoint.weights import load_weights
from nemo_kto.config import manifest
from nemo_kto.config.adapter_record import FILE, AdapterRecord
from nemo_kto.config.architecture import read_architecture
from nemo_kto.config.locate import hf_side, resume_path
from nemo_kto.config.lora import LoraSpec, check_layers, reference_mode
from nemo_kto.config.reference_cache import is_cached
from nemo_kto.config.resume import resumed_spec, run_adapters, run_record
from nemo_kto.config.schema import Config
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.errors import CheckpointError
from nemo_kto.gpt import lora
from nemo_kto.gpt.build import build_gpt
from nemo_kto.gpt.forward import Passes
from nemo_kto.reference.adapters_off import AdaptersOffReference
from nemo_kto.reference.base import Reference
from nemo_kto.reference.cache import CachedReference
from nemo_kto.reference.columns import ReferenceColumns
from nemo_kto.reference.host_weights import HostWeights
from nemo_kto.reference.late_capture import capture_from
from nemo_kto.reference.swap import SwapReference, WeightSwap
from nemo_kto.training.optim import wrap_data_parallel
from nemo_kto.training.reference_cache import cached, compute_dtype
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
        cache: keeps log-probs of the reference, where the run asks for that.
        reference_weights: what those are kept under, for a run that goes on with the kept reference; None without.
    """

    chunks: nn.ModuleList
    passes: Passes
    reference: ReferenceColumns
    swap: WeightSwap | None
    identity: str | None
    contents: Contents
    cache: CachedReference | None = None
    reference_weights: dict[str, str] | None = None

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
        if self._resume is None:
            spec = starting_spec(self._run.model.peft, self._arch)
        else:
            spec = resumed_spec(self._run, self._resume)
        return self._full() if spec is None else self._adapted(spec)

    def reference_alone(self) -> tuple[CachedReference, ReferenceColumns]:
        """The reference of a run with a cache, without a policy: nothing is swapped or kept but log-probs.

        Raises:
            CheckpointError: its weights cannot be read.
            ConfigError: the layout does not fit.
        """
        source = self._run.model.kto.reference_from_path  # with LoRA it is the base
        chunks = self._network()
        load_weights(chunks, self._arch, source, self._groups)
        passes = Passes(chunks, self._groups, self._arch.vocab_size)
        cache = cached(self._run, self._arch, base_identity(source), passes, self._groups)
        return cache, self._columns(cache)

    def _network(self, spec: LoraSpec | None = None) -> nn.ModuleList:
        model = self._run.model
        chunks: Sequence[nn.Module] = build_gpt(self._arch, model, bf16=self._run.trainer.is_bf16, groups=self._groups)
        if spec is not None:
            check_layers(spec, self._arch.num_layers, self._groups.pp_size)
            lora.attach(chunks, spec, self._groups, dropout=model.peft.lora_tuning.adapter_dropout)
        return nn.ModuleList(wrap_data_parallel(chunks, model.optim) if self._fitting else chunks)

    def _full(self) -> Policy:
        """The reference is loaded first and captured; where the policy starts elsewhere its weights then follow.

        With a cache it is captured when a row has to be scored, if any: till then no copy of it is held.
        """
        chunks = self._network()
        source = self._run.model.kto.reference_from_path
        load = partial(load_weights, chunks, self._arch, source, self._groups)
        kept = self._kept(f"model.kto.reference_from_path={source}", load, Contents(self._hf_side))
        settled = self._settle(kept, chunks)
        if is_cached(self._run.model.kto):
            weights = self._weights_of(settled, source)
            again = partial(self._load_again, kept, settled, chunks, weights)
            swap = self._swap(chunks, partial(capture_from, chunks, again))
        else:
            weights, swap = None, self._swap(chunks, HostWeights(chunks))
        if source != self._start:
            load_weights(chunks, self._arch, self._start, self._groups)
        return self._policy(chunks, swap, settled.identity, kept.contents, weights)

    def _weights_of(self, settled: Settled, source: str) -> str:
        """SHA-256 that the cache knows the reference by: of the checkpoint that the run first took it from.

        What a run keeps has the weights in its own dtype, and is a checkpoint of its own where the dtype has changed.
        """
        if settled.origin is None:
            return base_identity(source)
        known = (run_record(self._resume) if self._resume is not None else {}).get("reference_weights") or {}
        if known.get("dtype") == compute_dtype(self._run):
            return str(known["sha256"])
        return manifest.identity(settled.origin)

    def _load_again(self, kept: RunReference, settled: Settled, chunks: nn.ModuleList, weights: str) -> None:
        source = self._run.model.kto.reference_from_path
        if settled.identity is None and settled.origin is None and base_identity(source) != weights:
            raise CheckpointError(
                f"the weights in model.kto.reference_from_path={source} have changed since the start"
            )
        kept.load_again(chunks, self._groups, settled)

    def _adapted(self, spec: LoraSpec) -> Policy:
        """The base's weights never change. The reference is the base, or base and the adapters of the start."""
        model = self._run.model
        chunks = self._network(spec)
        record = AdapterRecord(spec, self._start, base_identity(self._start))
        if self._resume is not None and (saved := run_adapters(self._resume)) is not None:
            saved.check_base(self._start, record.base_sha256, self._resume)
        load_weights(chunks, self._arch, self._start, self._groups)
        contents = Contents(self._hf_side, documents={FILE: record.to_json()}, part=Part.ADAPTERS)
        load = partial(self._load_adapters, chunks, record)
        if reference_mode(model) == "adapters_off":
            if self._resume is None:
                load()
            weights = record.base_sha256 if is_cached(model.kto) else None
            return self._policy(chunks, None, record.base_sha256, contents, weights)
        kept = self._kept(f"model.peft.restore_from_path={model.peft.restore_from_path}", load, contents)
        settled = self._settle(kept, chunks)
        return self._policy(chunks, self._swap(chunks, HostWeights(chunks)), settled.identity, contents, None)

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

    def _kept(self, source: str, load: Callable[[], None], contents: Contents) -> RunReference:
        return RunReference(Path(self._run.exp_manager.explicit_log_dir), source, load, contents)

    def _settle(self, kept: RunReference, chunks: nn.ModuleList) -> Settled:
        """Fill the live parameters with the reference, which a run keeps from its start on."""
        exp = self._run.exp_manager
        return kept.settle(
            chunks,
            self._groups,
            resume_from=self._resume,
            may_differ=exp.resume_with_changes,
            keep=self._fitting and exp.create_checkpoint_callback,
        )

    def _swap(self, chunks: nn.ModuleList, reference: HostWeights | Callable[[], HostWeights]) -> WeightSwap:
        return WeightSwap(chunks, reference, self._run.model.kto.reference_restore)

    def _policy(
        self,
        chunks: nn.ModuleList,
        swap: WeightSwap | None,
        identity: str | None,
        contents: Contents,
        weights: str | None,
    ) -> Policy:
        passes = Passes(chunks, self._groups, self._arch.vocab_size)
        reference: Reference = AdaptersOffReference(chunks, passes) if swap is None else SwapReference(swap, passes)
        if weights is None:
            return Policy(chunks, passes, self._columns(reference), swap, identity, contents)
        cache = cached(self._run, self._arch, weights, reference, self._groups)
        record = {"sha256": weights, "dtype": compute_dtype(self._run)}
        return Policy(chunks, passes, self._columns(cache), swap, identity, contents, cache, record)

    def _columns(self, reference: Reference) -> ReferenceColumns:
        model = self._run.model
        return ReferenceColumns(reference, size=score_size(model), needs_kl=loss_settings(model.kto).needs_kl)
