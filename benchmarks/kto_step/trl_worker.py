"""TRL's KTOTrainer, one optimizer step at a time. Runs in an environment of its own, without nemo_kto.

The trainer's own loop, loader, loss, optimizer and metrics run; between two steps it waits for the driver.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.kto_step.counting import Counting, Watch, padded_pass
from benchmarks.kto_step.flops import Pass, Shape
from benchmarks.kto_step.server import StepServer
from benchmarks.kto_step.settings import Settings

PRECOMPUTE = "precompute"  # score the reference before training
WEIGHTS = "bf16_weights"  # bfloat16 weights and optimizer state; else bf16 means float32 weights under autocast


class OnDemandTrainer(trl.KTOTrainer):
    """TRL's trainer, which also keeps its unrounded loss and what scoring the reference in advance has cost."""

    loss = float("nan")
    reference_once: dict[str, float] | None = None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(*args, **kwargs)
        self.loss = float((result[0] if isinstance(result, tuple) else result).detach())
        return result

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        wall, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        result = super()._precompute_ref_logps(*args, **kwargs)
        now = resource.getrusage(resource.RUSAGE_SELF)
        self.reference_once = {
            "user_s": now.ru_utime - used.ru_utime,
            "sys_s": now.ru_stime - used.ru_stime,
            "wall_s": time.perf_counter() - wall,
            "rows": len(result),
        }
        return result


class Pause(TrainerCallback):
    """Waits for the driver between steps. A step is measured from the end of the one before: its batch is part."""

    def __init__(self, server: StepServer) -> None:
        self._server = server
        self._counting = Counting()
        self.trainer: OnDemandTrainer | None = None
        self.watch: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        self.watch = Watch([net for net in (trainer.model, trainer.ref_model) if net is not None], _read_pass)
        self._server.ready(
            versions={"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
            threads=torch.get_num_threads(),
            shape=vars(_shape(trainer.model.config)),
            reference_once=trainer.reference_once,
        )
        self._begin(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        counted = self._counting.stop()
        kl = self.trainer._metrics["train"]["kl"][-1]
        self._server.answer(loss=self.trainer.loss, kl=kl, passes=self.watch.take(), **counted)
        if state.global_step < state.max_steps:
            self._begin(state)

    def _begin(self, state: Any) -> None:
        if self._server.next(state.global_step).count:
            self._counting.start()


def _read_pass(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
    """Without Triton, TRL projects every position but the last of each row onto the vocabulary."""
    rows, length = kwargs["input_ids"].shape
    return padded_pass(rows, length, int(kwargs["attention_mask"].sum()), rows * (length - 1))


def _shape(config: Any) -> Shape:
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
    )


def _config(settings: Settings, steps: int) -> trl.KTOConfig:
    """TRL's defaults where they are its best here. Activation checkpointing, its default, costs time: off."""
    return trl.KTOConfig(
        output_dir=settings.out,
        max_steps=steps,
        per_device_train_batch_size=settings.rows,
        gradient_accumulation_steps=1,
        max_length=settings.seq_length,
        beta=settings.beta,
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch_fused",
        weight_decay=0.0,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.eps,
        max_grad_norm=settings.clip,
        precompute_ref_log_probs=PRECOMPUTE in settings.overrides,
        bf16=settings.bf16 and WEIGHTS not in settings.overrides,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    settings = Settings.from_json(sys.argv[1])
    server = StepServer()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    lines = Path(settings.data).read_text(encoding="utf-8").splitlines()
    records = [{key: json.loads(line)[key] for key in ("prompt", "completion", "label")} for line in lines]
    pause = Pause(server)
    dtype = torch.bfloat16 if WEIGHTS in settings.overrides else torch.float32
    trainer = OnDemandTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype),
        args=_config(settings, len(records) // settings.rows),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(settings.model),
        callbacks=[pause],
    )
    pause.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    main()
