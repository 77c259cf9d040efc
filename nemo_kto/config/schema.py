"""The shape of a configuration: names and types. Defaults and their explanations live in ``conf/``, nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KTOLoopConfig:
    """``trainer.kto``: how long to train, how often to look and save."""

    max_epochs: int
    max_steps: int
    val_check_interval: int | float
    save_interval: int
    limit_train_batches: int | float
    limit_val_batches: int | float
    gradient_clip_val: float
    max_consecutive_skips: int


@dataclass(frozen=True)
class TrainerConfig:
    """``trainer``: where to train and in which precision."""

    devices: int | None
    num_nodes: int | None
    accelerator: str
    precision: int | str
    join_timeout_minutes: float
    distributed_timeout_minutes: float
    kto: KTOLoopConfig

    @property
    def is_bf16(self) -> bool:
        """Whether weights are bfloat16 with float32 masters; otherwise everything is float32."""
        return str(self.precision).startswith("bf16")


@dataclass(frozen=True)
class CheckpointCallbackConfig:
    """``exp_manager.checkpoint_callback_params``: which checkpoints stay."""

    monitor: str
    mode: str
    save_top_k: int
    save_last_k: int
    async_save: bool


@dataclass(frozen=True)
class ExpManagerConfig:
    """``exp_manager``: what the run leaves on disk, and what it resumes from."""

    explicit_log_dir: str
    name: str
    max_time_per_run: str | None
    profile_steps: list[int] | None
    create_tensorboard_logger: bool
    create_wandb_logger: bool
    wandb_logger_kwargs: dict[str, Any]
    resume_if_exists: bool
    resume_ignore_no_checkpoint: bool
    resume_from_checkpoint: str | None
    resume_with_changes: bool
    create_checkpoint_callback: bool
    checkpoint_callback_params: CheckpointCallbackConfig


@dataclass(frozen=True)
class PretrainedConfig:
    """``pretrained_checkpoint``: where the policy starts."""

    restore_from_path: str


@dataclass(frozen=True)
class KTOConfig:
    """``model.kto``: the objective and the reference policy."""

    log_prob_forward_micro_batch_size: int
    ref_policy_kl_penalty: float
    desirable_loss_weight: float
    undesirable_loss_weight: float
    preference_average_log_probs: bool
    sft_average_log_probs: bool
    preference_loss_weight: float
    sft_loss_weight: float
    reference: str
    reference_from_path: str
    reference_lookahead: int
    reference_restore: str
    reference_cache_dir: str
    fixed_pairs: bool
    kl_clamp: str
    loss_normalization: str
    loss_type: str


@dataclass(frozen=True)
class LoraTuningConfig:
    """``model.peft.lora_tuning``: which linear layers get adapters, and of which kind."""

    target_modules: list[str]
    adapter_dim: int
    alpha: float | None
    adapter_dropout: float
    column_init_method: str
    row_init_method: str
    layer_selection: list[int] | None


@dataclass(frozen=True)
class PeftConfig:
    """``model.peft``: adapters."""

    peft_scheme: str
    restore_from_path: str | None
    lora_tuning: LoraTuningConfig


@dataclass(frozen=True)
class ScheduleConfig:
    """``model.optim.sched``: learning rate over steps."""

    name: str
    warmup_steps: int
    constant_steps: int
    min_lr: float


@dataclass(frozen=True)
class OptimConfig:
    """``model.optim``: Megatron's optimizer."""

    name: str
    lr: float
    weight_decay: float
    betas: list[float]
    eps: float
    momentum: float
    overlap_grad_sync: bool
    overlap_param_sync: bool
    sched: ScheduleConfig

    @property
    def is_distributed(self) -> bool:
        """Whether optimizer state is sharded over data-parallel ranks."""
        return self.name == "distributed_fused_adam"


@dataclass(frozen=True)
class DataFilesConfig:
    """``model.data.data_prefix``: the files."""

    train: list[str]
    validation: list[str] | None


@dataclass(frozen=True)
class DataConfig:
    """``model.data``: files to tokens."""

    data_prefix: DataFilesConfig
    seq_length: int
    packing: bool
    shuffle: bool
    append_eos: bool
    overlong: str
    num_workers: int
    tokenize_workers: int | None
    cache_dir: str | None


@dataclass(frozen=True)
class ModelConfig:
    """``model``: batch, layout, objective, optimizer and data."""

    micro_batch_size: int
    global_batch_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None
    context_parallel_size: int
    sequence_parallel: bool
    activations_checkpoint_granularity: str | None
    activations_checkpoint_method: str | None
    activations_checkpoint_num_layers: int | None
    hidden_dropout: float
    attention_dropout: float
    seed: int
    kto: KTOConfig
    peft: PeftConfig
    optim: OptimConfig
    data: DataConfig


@dataclass(frozen=True)
class Config:
    """A whole run."""

    trainer: TrainerConfig
    exp_manager: ExpManagerConfig
    pretrained_checkpoint: PretrainedConfig
    model: ModelConfig
