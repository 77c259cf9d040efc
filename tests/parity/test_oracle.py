"""The oracle itself: its network against transformers in float64, its gradient against finite differences."""

from __future__ import annotations

import ast
from pathlib import Path

import oracle
import oracle_llama
import pytest
import tiny
import torch
from oracle_llama import Llama

RECIPE = {"beta": 0.2, "optimizer": "sgd", "lr": 0.1, "seq_length": 64}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two directories of two-layer models, the start and another reference, and a file of records."""
    out = tmp_path_factory.mktemp("oracle")
    for seed, name in enumerate(["start", "reference"]):
        tiny.make_model(out / name, seed=seed, num_hidden_layers=2, tie_word_embeddings=request.param)
    tiny.make_records(out / "train.jsonl", 10)
    return out


def transformers_logits(folder: Path, ids: list[int], everything_in_float64: bool) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    # Eager attention takes its softmax in float32 whatever the model's dtype.
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()
    if everything_in_float64:
        # LlamaRMSNorm also computes in float32; torch's own norm, of the same definition, does not.
        for name, module in list(model.named_modules()):
            if type(module).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(module.weight.shape, module.variance_epsilon, dtype=torch.float64)
                norm.weight = module.weight
                model.set_submodule(name, norm)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def test_logits_are_those_of_transformers(folder: Path):
    ids = [(7 * i * i + 3) % 399 for i in range(200)]
    mine = Llama.load(folder / "start").logits(ids)
    # Float64 everywhere, logits of order 4: what is left is rounding of sums of a hundred terms, about 1e-14.
    torch.testing.assert_close(mine, transformers_logits(folder / "start", ids, True), rtol=0, atol=1e-12)
    # Untouched transformers rounds its norms to float32: 6e-8 relative, five norms deep, logits of order 4.
    torch.testing.assert_close(mine, transformers_logits(folder / "start", ids, False), rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", sorted(oracle.PRESETS))
@pytest.mark.parametrize("average", [False, True])
def test_gradient_is_the_slope_of_the_loss(folder: Path, preset: str, average: bool):
    policy, reference = Llama.load(folder / "start"), Llama.load(folder / "reference")
    recipe = oracle.Recipe(**RECIPE, preset=preset, sft_weight=0.1, average=average, sft_average=average)
    batch = oracle.read_samples(folder / "start", folder / "train.jsonl", 64)[:8]
    assert {sample.desirable for sample in batch} == {True, False}
    kl_ref, pairs = oracle.reference_point(policy, reference, batch, recipe)

    def loss() -> torch.Tensor:
        return oracle.batch_outcome(policy, reference, batch, recipe, kl_ref, pairs).loss

    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.gate_proj.weight", "model.norm.weight"):
        weight = policy.weights[name].requires_grad_()
        (grad,) = torch.autograd.grad(loss(), weight)
        place = tuple(int(i) for i in torch.unravel_index(grad.abs().argmax(), grad.shape))
        step, values = 1e-5, []
        with torch.no_grad():
            for sign in (1, -1):
                weight[place] += sign * step
                values.append(loss().item())
                weight[place] -= sign * step
        # Central differences: step^2 times the third derivative, plus 1e-16 / step of rounding.
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(grad[place].item(), rel=1e-6, abs=1e-9)
        weight.requires_grad_(False)


def test_first_step_from_the_reference(folder: Path):
    first = oracle.run_oracle(
        folder / "start", folder / "train.jsonl", steps=1, global_batch_size=8, preset="kto", **RECIPE
    )[0]
    assert (first["num_desirable"] + first["num_undesirable"], first["kl_pairs"]) == (8, 8)
    assert first["kl"] == first["rewards/chosen"] == first["rewards/margins"] == 0.0
    assert first["loss"] == pytest.approx(1.0, abs=1e-15)  # (w_des + w_und) / 2, a few float64 roundings
    assert first["logps/chosen"] < -10
    assert first["grad_norm"] > 0


def test_sgd_step_is_learning_rate_times_clipped_gradient(folder: Path):
    run = {"steps": 1, "global_batch_size": 4, "preset": "kto_paper", **RECIPE}
    start, moved, clipped = Llama.load(folder / "start").weights, {}, {}
    history = oracle.run_oracle(folder / "start", folder / "train.jsonl", final_state=moved, **run)
    oracle.run_oracle(folder / "start", folder / "train.jsonl", final_state=clipped, clip=0.01, **run)

    def travel(end: dict[str, torch.Tensor]) -> float:
        return sum(((end[name] - start[name]) ** 2).sum().item() for name in start) ** 0.5

    # Float64, but the weights, of order 1, hide the last 1e-16 of a step of 1e-2.
    assert travel(moved) == pytest.approx(0.1 * history[0]["grad_norm"], rel=1e-9)
    assert travel(clipped) == pytest.approx(0.1 * 0.01, rel=2e-6)  # Megatron's 1e-6 in the denominator


def test_only_matrices_decay(folder: Path):
    run = {"steps": 1, "global_batch_size": 4, "preset": "kto", **RECIPE, "optimizer": "adamw", "lr": 1e-2}
    start, plain, decayed = Llama.load(folder / "start").weights, {}, {}
    oracle.run_oracle(folder / "start", folder / "train.jsonl", final_state=plain, **run)
    oracle.run_oracle(folder / "start", folder / "train.jsonl", final_state=decayed, weight_decay=0.5, **run)
    for name, weight in start.items():
        expected = plain[name] - (1e-2 * 0.5 * weight if weight.dim() >= 2 else 0)
        torch.testing.assert_close(decayed[name], expected, rtol=0, atol=1e-12)  # float64 rounding near 1


def test_batches_follow_the_file_and_start_anew(folder: Path):
    run = {"steps": 4, "global_batch_size": 4, "preset": "kto", **RECIPE, "lr": 0.0}
    history = oracle.run_oracle(folder / "start", folder / "train.jsonl", **run)
    # Ten records make two batches of four; without learning the third step repeats the first.
    assert history[2:] == history[:2]
    assert history[0] != history[1]


def test_partners_skip_equal_prompts_and_equal_responses():
    batch = [oracle.Sample([p], [r], True) for p, r in [(1, 1), (1, 2), (2, 1), (3, 4)]]
    assert [oracle.partner_of(batch, i) for i in range(4)] == [batch[3], batch[2], batch[3], batch[0]]
    assert oracle.partner_of(batch[:2], 0) is None


def test_it_shares_no_code_with_the_package():
    for module in (oracle, oracle_llama):
        tree = ast.parse(Path(module.__file__).read_text())
        imports = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imports += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert not {name.partition(".")[0] for name in imports} & {"nemo_kto", "megatron", "nemo"}
