"""Bytes that one pipeline stage keeps from forward to backward, and works with in between.

After Korthikanti et al., arXiv 2205.05198, section 4, which counts what the backward of a GPT layer needs:
s b h (34 + 5 a s / h) bytes. Counted anew here for this network: no biases, no dropout masks, SwiGLU with F columns
twice and once, G key/value heads for A query heads of D channels, and an attention kernel that keeps no scores but the
logarithm of each row's sum in float32. Per token of a micro-batch, on one of t tensor-parallel ranks, with e bytes per
element, and t' = t with sequence parallelism (their equation 4), else 1:

    norms      (4 H e + 8) / t'             inputs and outputs of both, and their two float32 factors
    attention  (3 A + 3 G) D e / t + 4 A / t  q and k after RoPE, the output, and q, k, v as they were projected: v is
                                            a view of them, so they all stay (a kernel that copies v needs less)
               4 (A + G) / t                with norms of q and k: their float32 factors
    SwiGLU     3 F e / t                    gate and up, and their product; what lies between is computed again

A recomputed unit of layers keeps its input alone, H e / t', and during its backward one unit's full activations.
Recomputing core attention alone (``selective``) saves nothing under such a kernel: the output that it would drop is
the projection's input, which stays.
"""

from __future__ import annotations

from nemo_kto.planning.request import Job, Layout
from nemo_kto.planning.shape import adapter_elements

CHUNK_BYTES = 256 * 2**20
"""As :data:`nemo_kto.distributed.logprobs.CHUNK_BYTES`, which cannot be imported without torch."""


def layer_bytes(job: Job, layout: Layout, tokens: int) -> int:
    """What one decoder layer keeps of a micro-batch of ``tokens`` tokens; see the top of this file."""
    arch, size = job.arch, job.weight_bytes
    norms = (4 * arch.hidden_size * size + 8) * tokens // layout.sequence_shards
    heads = 3 * (arch.num_attention_heads + arch.num_query_groups) * arch.head_dim
    sharded = (heads + 3 * arch.ffn_hidden_size) * size + 4 * arch.num_attention_heads
    if arch.qk_norm:
        sharded += 4 * (arch.num_attention_heads + arch.num_query_groups)
    return norms + sharded * tokens // layout.tp + _adapter_bytes(job, layout, tokens)


def _adapter_bytes(job: Job, layout: Layout, tokens: int) -> int:
    """Of LoRA: the channels between A and B of four linear layers, and A and B in the activations' dtype."""
    if job.lora_dim is None:
        return 0
    copies = adapter_elements(job.arch, layout.tp, job.lora_dim) if job.bf16 else 0
    return (4 * job.lora_dim * tokens + copies) * job.weight_bytes


def stage_bytes(job: Job, layout: Layout, stage: int) -> int:
    """Activations of a pipeline stage at their highest.

    Megatron's one-forward-one-backward schedule: stage i of P has min(M, P - i) of M micro-batches in flight, and of
    each but the last stage's the output too, until its gradient comes. The last stage keeps the input of the final
    norm and that of the head, which are gone when the backward pass reaches its layers. Then one micro-batch has a
    unit's full activations, and still what comes before that unit: with ``uniform`` at worst every input, with
    ``block``, whose recomputed layers come first, theirs alone.
    """
    tokens = layout.micro_batch_size * job.seq_length
    full, unit = layer_bytes(job, layout, tokens), _input_bytes(job, layout, tokens)
    layers, again = job.arch.num_layers // layout.pp, layout.recompute_layers
    if layout.recompute == "uniform":
        kept = layers // again * unit
        peak = kept - unit + again * full  # full has the unit's input too
    else:
        kept = again * unit + (layers - again) * full
        peak = again * unit - unit + full if again else 0
    if stage == layout.pp - 1:
        return max(kept + unit + job.arch.hidden_size * job.weight_bytes * tokens, peak)
    flights = min(layout.micro_batches(job), layout.pp - stage)
    return flights * unit + (flights - 1) * kept + max(kept, peak)


def _input_bytes(job: Job, layout: Layout, tokens: int) -> int:
    """What goes from one layer to the next."""
    return job.arch.hidden_size * job.weight_bytes * tokens // layout.sequence_shards


def head_chunk_bytes(job: Job, layout: Layout) -> int:
    """The logits of one chunk of positions: in float32, and in bf16 too where that is the head's dtype."""
    columns = layout.vocabulary_columns(job.arch)
    rows, _ = _chunks(job, layout)
    return rows * columns * (6 if job.bf16 else 4)


def head_bytes(job: Job, layout: Layout) -> int:
    """What the LM head works with in backward, all positions being responses.

    A chunk's logits, the gradient of its input, and that of its weight: the latter in the weight's dtype, and beside
    it in float32 where several chunks are summed in bf16 (:mod:`nemo_kto.distributed.lm_head`).
    """
    tokens, columns = layout.micro_batch_size * job.seq_length, layout.vocabulary_columns(job.arch)
    _, chunks = _chunks(job, layout)
    weight = 0
    if job.lora_dim is None:
        weight = columns * job.arch.hidden_size * (6 if job.bf16 and chunks > 1 else job.weight_bytes)
    return head_chunk_bytes(job, layout) + tokens * job.arch.hidden_size * job.weight_bytes + weight


def remakes_logits(job: Job, layout: Layout) -> bool:
    """Whether the head's backward projects once more: with several chunks, no logits are kept."""
    return _chunks(job, layout)[1] > 1


def _chunks(job: Job, layout: Layout) -> tuple[int, int]:
    """(Positions of a chunk, number of chunks), as :func:`nemo_kto.distributed.logprobs.response_logprobs` cuts."""
    tokens = layout.micro_batch_size * job.seq_length
    most = max(1, CHUNK_BYTES // (layout.vocabulary_columns(job.arch) * 4))
    chunks = -(-tokens // most)
    return -(-tokens // chunks), chunks


def work_bytes(job: Job, layout: Layout, stage: int) -> int:
    """What a layer's backward works with at its highest, or the embedding's where that is more.

    In the feed-forward layer: gradients of gate, up and their product, the input gathered over tensor-parallel ranks
    and its gradient, and the gradient of the matrix before Megatron adds it to its float32 buffer. The embedding's
    gradient is as large as the embedding.
    """
    arch, size = job.arch, job.weight_bytes
    tokens = layout.micro_batch_size * job.seq_length
    layer = (3 * arch.ffn_hidden_size // layout.tp + 2 * arch.hidden_size) * tokens * size
    if job.lora_dim is not None:
        return layer
    layer += 2 * arch.ffn_hidden_size * arch.hidden_size // layout.tp * size
    embedding = layout.vocabulary_columns(arch) * arch.hidden_size * size if stage == 0 else 0
    return max(layer, embedding)
