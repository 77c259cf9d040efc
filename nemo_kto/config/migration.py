"""What became of keys that NeMo-Aligner's ``gpt_kto.yaml`` has and this project does not."""

from __future__ import annotations

_REMOVE = "remove it"
_ADVICE = {
    "trainer.logger": f"{_REMOVE} (loggers come from exp_manager)",
    "trainer.enable_checkpointing": f"{_REMOVE} (checkpoints come from exp_manager)",
    "trainer.use_distributed_sampler": f"{_REMOVE} (the data module shards over data parallel itself)",
    "trainer.max_time": "use exp_manager.max_time_per_run",
    "trainer.max_epochs": "use trainer.kto.max_epochs",
    "trainer.max_steps": "use trainer.kto.max_steps",
    "trainer.gradient_clip_val": "use trainer.kto.gradient_clip_val",
    "exp_manager.exp_dir": "use exp_manager.explicit_log_dir",
    "exp_manager.checkpoint_callback_params.always_save_nemo": f"{_REMOVE} (export with `nemo-kto convert`)",
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end": f"{_REMOVE} (export with `nemo-kto convert`)",
    "exp_manager.checkpoint_callback_params.filename": f"{_REMOVE} (checkpoints are named by step)",
    "exp_manager.checkpoint_callback_params.model_parallel_size": f"{_REMOVE} (known from the model section)",
    "model.mcore_gpt": f"{_REMOVE} (always Megatron-Core)",
    "model.megatron_amp_O2": f"{_REMOVE} (bf16 always keeps float32 masters)",
    "model.encoder_seq_length": "use model.data.seq_length",
    "model.max_position_embeddings": f"{_REMOVE} (read from the pretrained model)",
    "model.optim.bucket_cap_mb": f"{_REMOVE} (Megatron chooses its buckets)",
    "model.optim.contiguous_grad_buffer": f"{_REMOVE} (always contiguous)",
    "model.optim.overlap_param_gather": "use model.optim.overlap_param_sync",
    "model.data.data_impl": f"{_REMOVE} (the file name tells the format)",
    "model.data.splits_string": f"{_REMOVE}: list files under model.data.data_prefix.train and .validation",
    "model.data.data_prefix.test": f"{_REMOVE} (score a test set with `nemo-kto score`)",
    "model.data.skip_warmup": _REMOVE,
    "model.data.dataloader_type": f"{_REMOVE} (model.data.shuffle says whether the order is random)",
    "model.data.reset_position_ids": f"{_REMOVE} (one sample per row)",
    "model.data.reset_attention_mask": f"{_REMOVE} (one sample per row)",
    "model.data.eod_mask_loss": f"{_REMOVE} (the response's EOS is always scored)",
    "model.data.index_mapping_dir": "use model.data.cache_dir",
    "model.overwrite_base_config": _REMOVE,
    "model.peft.restore_from_ckpt": "use model.peft.restore_from_path",
    "model.peft.lora_tuning.weight_tying": f"{_REMOVE} (every layer has its own adapters)",
    "model.peft.lora_tuning.position_embedding_strategy": f"{_REMOVE} (of weight tying)",
    "model.ub_tp_comm_overlap_cfg": f"{_REMOVE} (and the tp_overlap line of the defaults)",
    "precision": "use trainer.precision",
}


def advice_for(key: str) -> str | None:
    """The fix for ``key``, or for the group it belongs to; None if NeMo-Aligner has no such key."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        advice = _ADVICE.get(".".join(parts[:end]))
        if advice:
            return advice
    return None
