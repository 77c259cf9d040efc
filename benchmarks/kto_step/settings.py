"""What all contenders compute, and the words each of them has for it. Standard library only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """One training, the same for all: the paper's objective, a constant rate without warm-up, AdamW, clipping at 1.

    Attributes:
        model: Hugging Face directory.
        data: records in the order of training.
        out: where this worker may write.
        bf16: bfloat16 products with float32 masters; else float32.
        rows: samples per optimizer step, over all ranks.
        ranks: data-parallel processes.
        overrides: a contender's own settings (``nemo-kto train`` overrides, or words of TRL's worker).
    """

    model: str
    data: str
    out: str
    bf16: bool
    rows: int
    ranks: int = 1
    overrides: tuple[str, ...] = ()
    beta: float = 0.1
    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    clip: float = 1.0
    seq_length: int = 128

    def to_json(self) -> str:
        """One argument of a worker's command line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Settings:
        """The other way."""
        values = json.loads(text)
        return Settings(**{**values, "overrides": tuple(values["overrides"]), "betas": tuple(values["betas"])})

    def hydra(self) -> list[str]:
        """Overrides of ``nemo-kto train``. Each rank's share in one forward, no validation, no checkpoint."""
        return [
            "loss=kto_paper",
            f"trainer.precision={'bf16' if self.bf16 else 32}",
            f"trainer.kto.gradient_clip_val={self.clip}",
            "trainer.kto.limit_val_batches=0",
            f"exp_manager.explicit_log_dir={Path(self.out) / 'run'}",
            "exp_manager.create_checkpoint_callback=false",
            "exp_manager.resume_if_exists=false",
            f"pretrained_checkpoint.restore_from_path={self.model}",
            f"model.micro_batch_size={self.rows // self.ranks}",
            f"model.global_batch_size={self.rows}",
            f"model.kto.ref_policy_kl_penalty={self.beta}",
            "model.optim.name=adamw",
            f"model.optim.lr={self.lr}",
            f"model.optim.betas=[{self.betas[0]},{self.betas[1]}]",
            f"model.optim.eps={self.eps}",
            "model.optim.weight_decay=0.0",
            "model.optim.sched.name=Constant",
            "model.optim.sched.warmup_steps=0",
            f"model.data.data_prefix.train=[{self.data}]",
            f"model.data.seq_length={self.seq_length}",
            "model.data.shuffle=false",
            "model.data.num_workers=0",
            f"model.data.cache_dir={Path(self.out) / 'cache'}",
            *self.overrides,
        ]
