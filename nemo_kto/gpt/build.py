"""Architecture and config to Megatron model chunks. Weights come from a checkpoint afterwards, never from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from nemo_kto.config.architecture import Architecture
from nemo_kto.config.layout import check_layout, padded_vocab_size
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.errors import ConfigError
from nemo_kto.gpt.attention import SDPAttention
from nemo_kto.gpt.network import Bfloat16Module, HiddenStateGPT, unwrap
from nemo_kto.gpt.norm import RMSNorm
from nemo_kto.gpt.rope import inverse_frequencies

__all__ = ["NetworkConfig", "PlainNetwork", "build_gpt", "has_transformer_engine", "unwrap"]


class NetworkConfig(Protocol):
    """The part of :class:`nemo_kto.config.schema.ModelConfig` that shapes the network."""

    @property
    def virtual_pipeline_model_parallel_size(self) -> int | None: ...  # noqa: D102
    @property
    def context_parallel_size(self) -> int: ...  # noqa: D102
    @property
    def sequence_parallel(self) -> bool: ...  # noqa: D102
    @property
    def activations_checkpoint_granularity(self) -> str | None: ...  # noqa: D102
    @property
    def activations_checkpoint_method(self) -> str | None: ...  # noqa: D102
    @property
    def activations_checkpoint_num_layers(self) -> int | None: ...  # noqa: D102
    @property
    def hidden_dropout(self) -> float: ...  # noqa: D102
    @property
    def attention_dropout(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class PlainNetwork:
    """A :class:`NetworkConfig` for programs without a training config, such as converters: nothing switched on."""

    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    activations_checkpoint_granularity: str | None = None
    activations_checkpoint_method: str | None = None
    activations_checkpoint_num_layers: int | None = None
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0


def has_transformer_engine() -> bool:
    """Whether layers are built from Transformer Engine: installed, and a GPU to run it on."""
    return HAVE_TE and torch.cuda.is_available()


def build_gpt(
    arch: Architecture, model_cfg: NetworkConfig, *, bf16: bool, groups: ParallelGroups
) -> list[MegatronModule]:
    """Build this rank's slice of the network: its TP shard of its PP stage's layers.

    Args:
        arch: the network, unsharded.
        model_cfg: a ``ModelConfig``, or :class:`PlainNetwork`.
        bf16: bfloat16 parameters in a half-precision wrapper; otherwise float32.
        groups: the layout, which must be the one Megatron was initialised with.

    Returns:
        One chunk, on ``groups.device``, not wrapped in DDP. Matrices and biases are 0 and norms 1 until a checkpoint
        is loaded; rows that pad the vocabulary stay 0.

    Raises:
        ConfigError: the layout does not divide the network, or needs a feature that is not built.
    """
    check_layout(arch, tensor_parallel=groups.tp_size, pipeline_parallel=groups.pp_size)
    config = _transformer_config(arch, model_cfg, bf16, groups)
    model = HiddenStateGPT(
        config,
        _layers(config),
        vocab_size=padded_vocab_size(arch.vocab_size, groups.tp_size),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        parallel_output=True,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        share_embeddings_and_output_weights=arch.tied_embeddings,
    )
    model.rotary_pos_emb.inv_freq = inverse_frequencies(arch, groups.device)
    _mark_shards(model)
    _clear(model)
    model.to(groups.device)
    return [Bfloat16Module(config, model) if bf16 else model]


def _transformer_config(
    arch: Architecture, model_cfg: NetworkConfig, bf16: bool, groups: ParallelGroups
) -> TransformerConfig:
    if model_cfg.context_parallel_size != 1:
        raise ConfigError(f"model.context_parallel_size={model_cfg.context_parallel_size} is not supported, only 1")
    if model_cfg.virtual_pipeline_model_parallel_size is not None:
        raise ConfigError("model.virtual_pipeline_model_parallel_size is not supported: set it to null")
    if model_cfg.sequence_parallel and groups.tp_size == 1:
        raise ConfigError("model.sequence_parallel needs model.tensor_model_parallel_size > 1")
    dtype = torch.bfloat16 if bf16 else torch.float32
    on_gpu = groups.device.type == "cuda"
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        hidden_dropout=model_cfg.hidden_dropout,
        attention_dropout=model_cfg.attention_dropout,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        tensor_model_parallel_size=groups.tp_size,
        pipeline_model_parallel_size=groups.pp_size,
        sequence_parallel=model_cfg.sequence_parallel,
        # Batches differ in length, so stages must tell each other shapes. Megatron allows that only with this
        # dispatcher, even where there are no experts to dispatch to.
        variable_seq_lengths=groups.pp_size > 1,
        moe_token_dispatcher_type="alltoall",
        recompute_granularity=model_cfg.activations_checkpoint_granularity,
        recompute_method=model_cfg.activations_checkpoint_method,
        recompute_num_layers=model_cfg.activations_checkpoint_num_layers,
        # These two are torch.compile'd by Megatron itself; the others need Apex or Transformer Engine kernels.
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def _layers(config: TransformerConfig) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's layers, or Megatron's local ones with our norm and attention."""
    if has_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SDPAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    # A bare layer spec would get Megatron's torch norm as the final one, which refuses sequence parallelism.
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def _mark_shards(model: torch.nn.Module) -> None:
    """Mark TP-sharded weights as such.

    Megatron marks them only while initialising them. Unmarked they pass for replicas, and the gradient norm would
    count the shard of TP rank 0 alone.
    """
    for module in model.modules():
        if not isinstance(module, VocabParallelEmbedding | ColumnParallelLinear | RowParallelLinear):
            continue
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def _clear(model: torch.nn.Module) -> None:
    """Zero what was only allocated: stray NaNs in padding rows would spread through the optimizer."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
