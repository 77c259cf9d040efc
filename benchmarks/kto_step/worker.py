"""Our training, one optimizer step at a time: what ``nemo-kto train`` runs, and a callback that waits in between."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.kto_step.server import StepServer
from benchmarks.kto_step.settings import Settings

ALIGNER = "aligner"
"""Command-line word for NeMo-Aligner's algorithm in place of our step."""


def main() -> None:
    settings = Settings.from_json(sys.argv[1])
    server = StepServer()
    from nemo_kto import cpu_backend
    from nemo_kto.quiet import quiet, quiet_nemo

    quiet()
    cpu_backend.install()
    quiet_nemo()
    _train(settings, server, as_aligner=ALIGNER in sys.argv[2:])


def _train(settings: Settings, server: StepServer, *, as_aligner: bool) -> None:
    """As ``nemo-kto train`` and ``nemo_kto.training.trainer.fit`` do it, with one more callback."""
    from nemo_kto.cli.train import check_model, read_data
    from nemo_kto.config.checks import check
    from nemo_kto.config.load import load_config
    from nemo_kto.config.world import world_from_environment
    from nemo_kto.launch import shutdown
    from nemo_kto.training.kto_model import MegatronGPTKTOModel
    from nemo_kto.training.trainer import build_trainer

    config, world = load_config(settings.hydra()), world_from_environment()
    check(config, world.size)
    check_model(config)
    data = read_data(config)
    trainer = build_trainer(config, data, world)
    Path(config.exp_manager.explicit_log_dir).mkdir(parents=True, exist_ok=True)
    model_class = _aligner_model() if as_aligner else MegatronGPTKTOModel
    trainer.callbacks.append(_pause(server, full_logits=as_aligner))
    trainer.fit(model_class(config, trainer, data))
    shutdown()


def _aligner_model() -> Any:
    from benchmarks.kto_step.aligner import AlignerStep
    from nemo_kto.training.kto_model import MegatronGPTKTOModel

    class AlignerModel(MegatronGPTKTOModel):
        """Our model with the other step; its own reference goes, so that memory is what that step needs."""

        def configure_model(self) -> None:
            if self._policy is None:
                super().configure_model()
                self._step = AlignerStep(self.chunks, self._settings, self.trainer.strategy.groups)
                self._policy = replace(self._policy, reference=None, swap=self._step)

    return AlignerModel


def _pause(server: StepServer, *, full_logits: bool) -> Any:
    import torch
    from lightning.pytorch import Callback

    from benchmarks.kto_step.counting import Counting, Watch
    from nemo_kto.gpt.network import unwrap

    class Pause(Callback):
        """Waits for the driver between steps. A step is measured from the end of the one before: its batch is part."""

        def on_train_start(self, trainer: Any, model: Any) -> None:
            self._counting, self._bytes = Counting(), 0
            positions = None if full_logits else self._mean_response
            self._model, self._step = model, 0
            self._watch = Watch([unwrap(chunk) for chunk in model.chunks], _reader(positions))
            server.ready(
                versions={"torch": torch.__version__},
                threads=torch.get_num_threads(),
                shape=_shape(model.hf_side),
                parameter_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
            )
            self._begin()

        def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            counted = self._counting.stop()
            moved = model.policy.swap.bytes_moved if model.policy.swap is not None else 0
            facts = {name: float(trainer.callback_metrics[name]) for name in ("loss", "kl")}
            server.answer(**facts, passes=self._watch.take(), swap_bytes=moved - self._bytes, **counted)
            self._bytes, self._step = moved, self._step + 1
            if self._step < model.data.total_steps:
                self._begin()

        def _begin(self) -> None:
            if server.next(self._step).count:
                self._counting.start()

        def _mean_response(self) -> float:
            """Response tokens per row of this step's samples. Pairs have the same responses, so the same mean."""
            data = self._model.data
            rows, store = data.train_sampler.batch_indices(self._step), data._train_store
            return float((store.lengths(rows) - store.prompt_lengths[rows]).mean())

    return Pause()


def _reader(mean_response: Callable[[], float] | None) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Reads a forward's arguments: tokens, padded on the right with id 0, which no review holds, or packed."""
    import torch

    from benchmarks.kto_step.flops import Pass

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        tokens, packed = args[0], kwargs.get("packed_seq_params")
        lengths = [tokens.size(1)] * tokens.size(0) if packed is None else packed.cu_seqlens_q.diff().tolist()
        pads = int(((tokens != 0).flip(1).cumsum(1) == 0).sum())
        positions = tokens.numel() if mean_response is None else len(lengths) * mean_response()
        return Pass(tokens.numel(), pads, sum(n * n for n in lengths), positions, torch.is_grad_enabled())

    return read


def _shape(model: str) -> dict[str, int]:
    from benchmarks.kto_step.flops import Shape
    from nemo_kto.config.architecture import read_architecture

    arch = read_architecture(model)
    return asdict(
        Shape(
            layers=arch.num_layers,
            hidden=arch.hidden_size,
            ffn=arch.ffn_hidden_size,
            heads=arch.num_attention_heads,
            groups=arch.num_query_groups,
            head_dim=arch.head_dim,
            vocab=arch.vocab_size,
        )
    )


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
