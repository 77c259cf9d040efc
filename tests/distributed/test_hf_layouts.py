"""Hugging Face models cut over tensor- and pipeline-parallel ranks: same logits, and the same files come out again."""

from __future__ import annotations

from pathlib import Path

import hf_models
import pytest
import torch
from harness import run_ranks
from safetensors.torch import load_file

CASES = ("llama3", "llama_tied", "qwen2", "qwen3")
LAYOUTS = {
    "tp2": (2, 1, False),
    "tp2sp": (2, 1, True),
    "pp2": (1, 2, False),
    "tp2pp2": (2, 2, False),
    "tp2pp2sp": (2, 2, True),
    "pp4": (1, 4, False),
    "dp4": (1, 1, False),
}
"""(TP, PP, sequence parallelism) on 4 ranks; what is left is data parallel. 399 tokens do not divide by 2."""
LENGTHS = ([24, 11], [40, 33])
"""Rows of two micro-batches of unequal width, so that stages must tell each other shapes."""
TOLERANCE = 1e-4
"""|logit| is about 4. TP adds two partial sums per row-parallel linear where one rank adds all: a few ulp (5e-7) a
layer over 4 layers. A slice in the wrong place shows as 1e-1."""
SHARD_BYTES = 150_000  # a quarter of the model or less, so that stages write several files


def _build(folder, layout, bf16=False):
    from nemo_kto import launch
    from nemo_kto.checkpoint.hf_load import load_hf
    from nemo_kto.config.architecture import read_architecture
    from nemo_kto.gpt.build import PlainNetwork, build_gpt

    tensor, pipeline, sequence = LAYOUTS[layout]
    groups = launch.start(tensor, pipeline)
    arch = read_architecture(folder)
    chunks = build_gpt(arch, PlainNetwork(sequence_parallel=sequence), bf16=bf16, groups=groups)
    return arch, groups, chunks, load_hf(chunks, arch, folder, groups)


def _gathered_logits(chunks, groups, vocab_size):
    """Logits of all micro-batches through Megatron's schedule, [B, S, V] each on the last stage, else []."""
    import torch.distributed as dist
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from nemo_kto.gpt.build import unwrap

    def collect(hidden, non_loss_data):
        shard = unwrap(chunks[0]).logits(hidden).transpose(0, 1).contiguous()
        shards = [torch.empty_like(shard) for _ in range(groups.tp_size)]
        dist.all_gather(shards, shard, group=groups.tp)
        return torch.cat(shards, dim=-1)[..., :vocab_size]

    batches = [hf_models.batch(vocab_size, lengths)[0] for lengths in LENGTHS]
    with torch.no_grad():
        return get_forward_backward_func()(
            forward_step_func=lambda tokens, chunk: (chunk(next(tokens), None, None), collect),
            data_iterator=iter(batches),
            model=[chunk.eval() for chunk in chunks],
            num_microbatches=len(batches),
            seq_length=batches[0].shape[1],
            micro_batch_size=2,
            forward_only=True,
            collect_non_loss_data=True,
        )


def _check_layout(folder: Path, layout: str, out: Path) -> dict:
    """One model in one layout: worst logit error, bytes read and expected, marks of sharding; and an export."""
    from nemo_kto.checkpoint.hf_export import export_hf
    from nemo_kto.gpt.build import unwrap

    arch, groups, chunks, bytes_read = _build(folder, layout)
    expected = torch.load(folder / "logits.pt")
    errors = [
        (ours - theirs)[mask].abs().max().item()
        for ours, (theirs, mask) in zip(_gathered_logits(chunks, groups, arch.vocab_size), expected, strict=False)
    ]
    export_hf(chunks, arch, groups, folder, out, max_shard_bytes=SHARD_BYTES)
    named = dict(unwrap(chunks[0]).named_parameters())
    vocabulary = [p for name, p in named.items() if name.startswith(("embedding", "output_layer"))]
    last_shard_pads = groups.tp_size == 2 and groups.tp_rank == 1  # row 400 of 399
    padding = sum(p[-1].nbytes for p in vocabulary) if last_shard_pads else 0
    sharded = {name for name, p in named.items() if getattr(p, "tensor_model_parallel", False)}
    return {
        "errors": errors,
        "is_last": groups.is_last_stage,
        "bytes": (bytes_read, sum(p.nbytes for p in named.values()) - padding),
        "sharded": sharded == {name for name in named if "norm" not in name},
        "head": unwrap(chunks[0]).head_weight().shape if groups.is_last_stage else None,
        "finite": all(p.isfinite().all().item() for p in named.values()),
    }


def _everything(rank: int, root: Path) -> dict:
    """All that needs ranks, in one set of them: starting a rank costs seconds."""
    results = {
        (case, layout): _check_layout(root / case, layout, root / "out" / f"{case}-{layout}")
        for layout in LAYOUTS  # outside: groups are rebuilt only when the sizes change
        for case in CASES
    }
    arch, groups, chunks, _ = _build(root / "bf16", "tp2pp2", bf16=True)
    results["refusal"] = _export_error(chunks, arch, groups, root / "bf16", root / "out")
    for layout in ("tp2", "tp2sp"):
        results["noise", layout] = _attention_noise(root / "bf16", layout)
    for layout in ("dp4", "tp2", "tp2sp"):
        results["gradients", layout] = _norm_gradients(root / "qwen3", layout)
    return results


def _export_error(chunks, arch, groups, folder: Path, out: Path) -> str:
    """Export once as bf16, once to a directory that is not ours, and return the refusal."""
    from nemo_kto.checkpoint.hf_export import export_hf
    from nemo_kto.errors import CheckpointError

    export_hf(chunks, arch, groups, folder, out / "bf16")
    try:
        export_hf(chunks, arch, groups, folder, out)
    except CheckpointError as error:
        return str(error)
    return ""


def _norm_gradients(folder: Path, layout: str) -> dict[str, torch.Tensor]:
    """Gradients of the norms' weights, as Megatron's optimizer would see them, of the sum of squared hidden states."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from nemo_kto.gpt.build import unwrap

    arch, _, chunks, _ = _build(folder, layout)
    network = unwrap(chunks[0])
    model = DistributedDataParallel(network.config, DistributedDataParallelConfig(), chunks[0])
    model.zero_grad_buffer()
    model(hf_models.batch(arch.vocab_size, LENGTHS[0])[0], None, None).square().sum().backward()
    finalize_model_grads([model], None)
    return {name: p.main_grad.clone() for name, p in network.named_parameters() if "norm" in name}


def _attention_noise(folder: Path, layout: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Output of attention with dropout on equal inputs, a draw from the default stream after it, and the TP rank."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.transformer.enums import AttnMaskType

    from nemo_kto.gpt.attention import SDPAttention
    from nemo_kto.gpt.build import unwrap

    _, groups, chunks, _ = _build(folder, layout)
    config = unwrap(chunks[0]).config
    attention = SDPAttention(config, 1, AttnMaskType.causal, "self", attention_dropout=0.5).train()
    query = torch.ones(6, 1, 2, 16)
    value = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 1, 16)
    if config.sequence_parallel:
        with get_cuda_rng_tracker().fork():  # as Megatron does around the whole block
            noisy = attention(query, query[:, :, :1], value)
    else:
        noisy = attention(query, query[:, :, :1], value)
    return noisy, torch.rand(3), groups.tp_rank


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The models, each with what transformers makes of the batches."""
    root = tmp_path_factory.mktemp("layouts")
    for case in CASES:
        folder = hf_models.make(case, root)
        batches = [hf_models.batch(399, lengths) for lengths in LENGTHS]
        torch.save([(hf_models.hf_logits(folder, *pair), pair[1]) for pair in batches], folder / "logits.pt")
    hf_models.make("llama_tied", root / "half", dtype="bfloat16").rename(root / "bf16")
    return root


@pytest.fixture(scope="module")
def results(root):
    (root / "out").mkdir()
    return run_ranks(4, _everything, root, timeout=240)


every = pytest.mark.parametrize(("case", "layout"), [(case, layout) for case in CASES for layout in LAYOUTS])


@pytest.mark.distributed
@every
def test_logits_equal_transformers(case, layout, results):
    last = [result[case, layout] for result in results if result[case, layout]["is_last"]]
    assert len(last) == 4 // LAYOUTS[layout][1]
    for result in last:
        assert len(result["errors"]) == len(LENGTHS)
        assert max(result["errors"]) < TOLERANCE
        assert result["head"] == (-(-399 // LAYOUTS[layout][0]), 64)


@pytest.mark.distributed
@every
def test_what_comes_out_is_what_went_in(case, layout, root, results):
    out = root / "out" / f"{case}-{layout}"
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > LAYOUTS[layout][1]
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    written = {}
    for file in files:
        assert file.stat().st_size < SHARD_BYTES + 10_000  # and its header
        written |= load_file(file)
    stored = load_file(root / case / "model.safetensors")
    assert written.keys() == stored.keys()
    for name in stored:
        assert torch.equal(written[name], stored[name]), name


@pytest.mark.distributed
@every
def test_a_rank_reads_its_slice_only(case, layout, results):
    for result in results:
        read, held = result[case, layout]["bytes"]
        assert read == held


@pytest.mark.distributed
@every
def test_shards_are_marked_and_padding_is_finite(case, layout, results):
    """Megatron's gradient norm counts an unmarked parameter on TP rank 0 alone."""
    for result in results:
        assert result[case, layout]["sharded"]
        assert result[case, layout]["finite"]


@pytest.mark.distributed
def test_transformers_loads_the_sharded_export(root, results):
    tokens, mask = hf_models.batch(399, LENGTHS[0])
    expected, _ = torch.load(root / "qwen3" / "logits.pt")[0]
    assert torch.equal(hf_models.hf_logits(root / "out" / "qwen3-tp2pp2", tokens, mask), expected)


@pytest.mark.distributed
def test_bfloat16_comes_out_as_it_went_in(root, results):
    stored = load_file(root / "bf16" / "model.safetensors")
    written = {}
    for file in (root / "out" / "bf16").glob("*.safetensors"):
        written |= load_file(file)
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())


@pytest.mark.distributed
def test_every_rank_stops_where_one_refuses(results):
    """Only the leading rank looked at the directory."""
    assert all("not empty and not an earlier export" in result["refusal"] for result in results)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp2", "tp2sp"])
def test_attention_dropout_differs_over_tp_and_leaves_the_default_stream_alone(layout, results):
    (first, after, rank), (second, after_second, rank_second) = (result["noise", layout] for result in results[:2])
    assert (rank, rank_second) == (0, 1)
    assert not torch.equal(first, second)  # other heads, other noise
    assert torch.equal(after, after_second)  # residual dropout, from this stream, must agree over TP


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp2", "tp2sp"])
def test_norms_get_the_whole_gradient(layout, results):
    """Under sequence parallelism a rank's norm sees half the positions; a q or k norm always sees half the heads."""
    expected = results[0]["gradients", "dp4"]
    assert len(expected) == 4 * 4 + 1
    for result in results:
        for name, gradient in result["gradients", layout].items():
            # fp32 sums over about 1500 products in another order: a few ulp; a half gradient would be off by 0.5
            assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name
