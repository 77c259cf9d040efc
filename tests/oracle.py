"""An independent account of KTO training: plain PyTorch in float64, one row at a time, no padding, no parallelism.

It shares no code with the package and imports neither it nor Megatron, so an agreement between the two is evidence.
The price is speed: use it on tiny models, or for a step or two of a small one.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from oracle_llama import Llama
from torch import Tensor

PRESETS = {
    "kto": {"clamp_each": True, "by_class": True, "anchored": True},
    "kto_paper": {"clamp_each": False, "by_class": False, "anchored": True},
    "apo_zero_unpaired": {"clamp_each": False, "by_class": False, "anchored": False},
}


# ------------------------------------------------------------------------------------------------ the data


@dataclass
class Sample:
    prompt: list[int]
    response: list[int]
    desirable: bool


def read_samples(model_dir: Path, jsonl: Path, seq_length: int) -> list[Sample]:
    """Samples in file order; rows longer than ``seq_length`` are dropped."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    samples = []
    for line in Path(jsonl).read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        record = json.loads(line)
        label = record["preference"] if "preference" in record else record["label"]
        text = record["response"] if "response" in record else record["completion"]
        assert label in ("chosen", "rejected", 0, 1), label
        prompt, response = _tokenize(tokenizer, record["prompt"], text)
        if len(prompt) + len(response) <= seq_length:
            samples.append(Sample(prompt, response, label in ("chosen", 1)))
    return samples


def _tokenize(tokenizer, prompt: str, response: str) -> tuple[list[int], list[int]]:
    alone, joint = tokenizer(prompt)["input_ids"], tokenizer(prompt + response)["input_ids"]
    split = 0
    while split < min(len(alone), len(joint)) and alone[split] == joint[split]:
        split += 1
    if joint[-1] != tokenizer.eos_token_id:
        joint = [*joint, tokenizer.eos_token_id]
    assert 0 < split < len(joint)
    return joint[:split], joint[split:]


def partner_of(batch: list[Sample], i: int) -> Sample | None:
    for distance in range(1, len(batch)):
        other = batch[(i + distance) % len(batch)]
        if other.prompt != batch[i].prompt and other.response != batch[i].response:
            return other
    return None


# ------------------------------------------------------------------------------------------------ the objective


@dataclass
class Recipe:
    """Everything but the model and the data."""

    beta: float
    preset: str
    optimizer: str
    lr: float
    seq_length: int
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    sft_weight: float = 0.0
    average: bool = False
    sft_average: bool = False


def response_logp(model: Llama, prompt: list[int], response: list[int], seq_length: int) -> tuple[Tensor, int]:
    """Sum of log-probabilities of the response's tokens in nats, and how many there are after the cut."""
    response = response[: max(0, seq_length - len(prompt))]
    if not response:
        return torch.zeros((), dtype=torch.float64), 0
    ids = prompt + response
    logps = torch.log_softmax(model.logits(ids), dim=-1)
    picked = [logps[len(prompt) - 1 + t, token] for t, token in enumerate(response)]
    return torch.stack(picked).sum(), len(response)


@dataclass
class Outcome:
    """One batch under the policy: the loss with its graph, and the numbers that are logged."""

    loss: Tensor
    kl_ref: float
    pairs: int
    rewards: list[float] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


def reference_point(policy: Llama, reference: Llama, batch: list[Sample], recipe: Recipe) -> tuple[float, int]:
    """KL_ref of the batch, and how many samples have a partner (scored or not)."""
    choice = PRESETS[recipe.preset]
    estimates = [_kl_estimate(policy, reference, batch, i, recipe) for i in range(len(batch))]
    known = [k for k in estimates if k is not None]
    if not choice["anchored"] or not known:
        return 0.0, len(known)
    if choice["clamp_each"]:
        return sum(max(0.0, recipe.beta * k) for k in known) / len(known), len(known)
    return max(0.0, recipe.beta * sum(known) / len(known)), len(known)


def batch_outcome(
    policy: Llama, reference: Llama, batch: list[Sample], recipe: Recipe, kl_ref: float, pairs: int
) -> Outcome:
    choice = PRESETS[recipe.preset]
    out = Outcome(torch.zeros((), dtype=torch.float64), kl_ref, pairs)
    good = sum(sample.desirable for sample in batch)
    bad = len(batch) - good
    for sample in batch:
        logp, tokens = response_logp(policy, sample.prompt, sample.response, recipe.seq_length)
        with torch.no_grad():
            ref_logp, _ = response_logp(reference, sample.prompt, sample.response, recipe.seq_length)
        reward = recipe.beta * (logp - ref_logp) / (tokens if recipe.average else 1)
        if sample.desirable:
            term = recipe.desirable_weight * (1 - torch.sigmoid(reward - kl_ref))
            out.loss = out.loss + term / (good if choice["by_class"] else len(batch))
            out.loss = out.loss + recipe.sft_weight * -logp / (tokens if recipe.sft_average else 1) / good
        else:
            term = recipe.undesirable_weight * (1 - torch.sigmoid(kl_ref - reward))
            out.loss = out.loss + term / (bad if choice["by_class"] else len(batch))
        out.rewards.append(reward.item())
        out.logps.append(logp.item())
    return out


def _kl_estimate(policy: Llama, reference: Llama, batch: list[Sample], i: int, recipe: Recipe) -> float | None:
    partner = partner_of(batch, i)
    if partner is None:
        return None
    with torch.no_grad():
        logp, tokens = response_logp(policy, batch[i].prompt, partner.response, recipe.seq_length)
        ref_logp, _ = response_logp(reference, batch[i].prompt, partner.response, recipe.seq_length)
    return (logp - ref_logp).item() / (max(tokens, 1) if recipe.average else 1)


# ------------------------------------------------------------------------------------------------ the training


def run_oracle(
    model_dir: Path,
    train_jsonl: Path,
    *,
    reference_dir: Path | None = None,
    steps: int,
    global_batch_size: int,
    final_state: dict[str, Tensor] | None = None,
    **recipe,
) -> list[dict]:
    """Train ``model_dir`` on the file in its order and return one dict of metrics per optimizer step.

    Args:
        model_dir: Hugging Face directory of the start and of the tokenizer.
        train_jsonl: records with string prompts and responses.
        reference_dir: the reference; the start if None.
        steps: optimizer steps; the file starts anew when no full batch is left.
        global_batch_size: samples per step.
        final_state: filled with the trained float64 weights under their Hugging Face names, if given.
        **recipe: the fields of :class:`Recipe`.
    """
    settings = Recipe(**recipe)
    policy = Llama.load(model_dir)
    reference = Llama.load(reference_dir) if reference_dir else policy.copy()
    for weight in policy.weights.values():
        weight.requires_grad_()
    samples = read_samples(model_dir, train_jsonl, settings.seq_length)
    optimizer = make_optimizer(list(policy.weights.values()), settings)
    history = []
    for step in range(steps):
        start = step % (len(samples) // global_batch_size) * global_batch_size
        batch = samples[start : start + global_batch_size]
        kl_ref, pairs = reference_point(policy, reference, batch, settings)
        outcome = batch_outcome(policy, reference, batch, settings, kl_ref, pairs)
        optimizer.zero_grad()
        outcome.loss.backward()
        norm = clip_gradients(list(policy.weights.values()), settings.clip)
        optimizer.step()
        history.append(metrics(batch, outcome, norm, settings.beta))
    if final_state is not None:
        final_state.update({name: weight.detach() for name, weight in policy.weights.items()})
    return history


def make_optimizer(weights: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """SGD without momentum or AdamW; norms do not decay."""
    groups = [
        {"params": [w for w in weights if w.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr)
    assert recipe.optimizer == "adamw"
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)


def clip_gradients(weights: list[Tensor], limit: float) -> float:
    """Scale all gradients as Megatron does if their joint norm exceeds ``limit`` (0: never); the norm before that."""
    grads = [w.grad for w in weights if w.grad is not None]
    norm = math.sqrt(sum((g * g).sum().item() for g in grads))
    if limit and norm > limit:
        for grad in grads:
            grad.mul_(limit / (norm + 1e-6))
    return norm


def metrics(batch: list[Sample], outcome: Outcome, norm: float, beta: float) -> dict:
    """The step's line of metrics.jsonl, as far as it does not depend on the machine."""

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    def of(values: list[float], desirable: bool) -> float | None:
        return mean([value for value, sample in zip(values, batch, strict=True) if sample.desirable == desirable])

    chosen, rejected = of(outcome.rewards, True), of(outcome.rewards, False)
    hits = [(r > outcome.kl_ref) == sample.desirable for r, sample in zip(outcome.rewards, batch, strict=True)]
    return {
        "loss": outcome.loss.item(),
        "kl": outcome.kl_ref / beta,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": None if chosen is None or rejected is None else chosen - rejected,
        "rewards/accuracies": mean([float(hit) for hit in hits]),
        "logps/chosen": of(outcome.logps, True),
        "logps/rejected": of(outcome.logps, False),
        "grad_norm": norm,
        "num_desirable": sum(sample.desirable for sample in batch),
        "num_undesirable": sum(not sample.desirable for sample in batch),
        "kl_pairs": outcome.pairs,
    }
