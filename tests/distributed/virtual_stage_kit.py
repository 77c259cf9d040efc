"""One step of Megatron's own GPT with virtual pipeline stages, which the product does not offer. No product code."""

from __future__ import annotations

import re
import zlib
from typing import Any

import torch
import torch.distributed as dist


def gpt_step(pp: int, virtual: int | None, **communication: bool) -> tuple[float, float]:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed, vocab_parallel_cross_entropy

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(1, pp, virtual)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    chunks = _chunks(pp, virtual, communication)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(0, 128, (2, 16), generator=generator) for _ in range(8)]
    positions, mask = torch.arange(16).expand(2, 16), torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)

    def step(items, chunk):
        tokens = next(items)

        def finish(logits):
            losses = vocab_parallel_cross_entropy(
                logits[:, :-1].transpose(0, 1).contiguous(), tokens[:, 1:].t().contiguous()
            )
            return losses.mean(), {"loss": losses.mean().detach().clone()}

        return chunk(tokens, positions, mask), finish

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(data) for _ in chunks] if virtual else iter(data),
        model=chunks,
        num_microbatches=len(data),
        seq_length=16,
        micro_batch_size=2,
        forward_only=False,
    )
    loss = sum(out["loss"].item() for out in outputs) / len(data)
    squares = sum(float(p.grad.double().square().sum()) for chunk in chunks for p in chunk.parameters())
    totals = torch.tensor([loss, squares], dtype=torch.float64)
    dist.all_reduce(totals, group=parallel_state.get_pipeline_model_parallel_group())
    return totals[0].item(), totals[1].sqrt().item()


def _chunks(pp: int, virtual: int | None, communication: dict[str, bool]) -> list[torch.nn.Module]:
    """This rank's share of a small GPT, with weights that depend on their names alone."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual,
        **dict.fromkeys(("persist_layer_norm", "bias_dropout_fusion", "masked_softmax_fusion"), False),
        **dict.fromkeys(("gradient_accumulation_fusion", "bias_activation_fusion"), False),
        **communication,
    )
    chunks = []
    for number in range(virtual or 1):
        place = {"vp_stage": number} if virtual else {}
        first = {"ignore_virtual": False, **place} if virtual else {}
        chunk = GPTModel(
            config,
            get_gpt_layer_local_spec(),
            vocab_size=128,
            max_sequence_length=16,
            pre_process=parallel_state.is_pipeline_first_stage(**first),
            post_process=parallel_state.is_pipeline_last_stage(**first),
            position_embedding_type="rope",
            **place,
        )
        _fill(chunk)
        chunks.append(chunk)
    return chunks


def _fill(chunk: Any) -> None:
    for name, parameter in chunk.named_parameters():
        found = re.match(r"decoder\.layers\.(\d+)\.", name)
        if found:
            name = f"{chunk.decoder.layers[int(found[1])].layer_number}.{name[found.end() :]}"
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        with torch.no_grad():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
