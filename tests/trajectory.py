"""One small training, described once for all that run it: ranks without NeMo, the command line, the oracle.

The package and Megatron are imported where they are used, so that a process that only reads files stays light.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import tiny
import torch
from torch import Tensor

STEPS, GLOBAL_BATCH, SEQ_LENGTH = 10, 8, 64
LONGEST_RESPONSE = 34  # tokens of the records below, EOS included

# ------------------------------------------------------------------------------------------------ tolerances

RELATIVE = 1e-5
"""Of losses and reference points (design, section 5). Float32 keeps 6e-8; a loss is a smooth function of a few
hundred log-probs, and ten optimizer steps let their errors grow a little. A wrong scale or row shows as 1e-3."""
TOKEN_ROUNDING = 2.0**-21
"""nats. A token's log-prob is a float32 number between -16 and -4 here, so half a unit in its last place is at most
2^-21 = 4.8e-7: an error that any float32 implementation makes per token."""
GRADIENT = 1e-4
"""Of gradients and their norms (design, section 5): float32 GEMMs round them by some 1e-6, the smallest tensors carry
cancellation on top, and after the first step they are taken at weights that differ a little."""


@dataclass(frozen=True)
class Recipe:
    """What is computed. How (layout, micro-batches, overlap) must not matter."""

    preset: str = "kto"
    optimizer: str = "adamw"
    lr: float = 1e-4
    clip: float = 0.0
    weight_decay: float = 0.1
    beta: float = 0.2
    desirable_weight: float = 1.5
    undesirable_weight: float = 1.25
    sft_weight: float = 0.0
    average: bool = False
    sft_average: bool = False
    tied: bool = False
    start: str = "policy"

    def folder(self, root: Path) -> Path:
        """Where its ``policy`` and ``reference`` are."""
        return root / ("tied" if self.tied else "untied")

    def overrides(self, root: Path) -> list[str]:
        """The command line's words for it."""
        return [
            f"loss={self.preset}",
            f"pretrained_checkpoint.restore_from_path={self.folder(root) / self.start}",
            f"model.kto.reference_from_path={self.folder(root) / 'reference'}",
            f"model.kto.ref_policy_kl_penalty={self.beta}",
            f"model.kto.desirable_loss_weight={self.desirable_weight}",
            f"model.kto.undesirable_loss_weight={self.undesirable_weight}",
            f"model.kto.sft_loss_weight={self.sft_weight}",
            f"model.kto.preference_average_log_probs={self.average}",
            f"model.kto.sft_average_log_probs={self.sft_average}",
            f"model.data.data_prefix.train=[{root / 'train.jsonl'}]",
            f"model.data.cache_dir={root / 'cache'}",
            f"model.data.seq_length={SEQ_LENGTH}",
            "model.data.num_workers=0",
            "model.data.shuffle=false",
            f"model.global_batch_size={GLOBAL_BATCH}",
            f"model.optim.name={self.optimizer}",
            f"model.optim.lr={self.lr}",
            f"model.optim.weight_decay={self.weight_decay}",
            "model.optim.sched.name=Constant",
            "model.optim.sched.warmup_steps=0",
            f"trainer.kto.gradient_clip_val={self.clip}",
            f"trainer.kto.max_steps={STEPS}",
            "trainer.kto.max_epochs=2",
            "trainer.precision=32",
        ]

    def in_oracles_words(self) -> dict[str, Any]:
        """The fields of ``oracle.Recipe``."""
        mine = {name: value for name, value in vars(self).items() if name not in ("tied", "start")}
        return {**mine, "seq_length": SEQ_LENGTH, "betas": (0.9, 0.98)}

    def oracle_history(self, root: Path, final_state: dict[str, Tensor] | None = None) -> list[dict]:
        """The oracle's line of metrics for each step, and its trained weights."""
        with one_thread():
            history = oracle.run_oracle(
                self.folder(root) / self.start,
                root / "train.jsonl",
                reference_dir=self.folder(root) / "reference",
                steps=STEPS,
                global_batch_size=GLOBAL_BATCH,
                final_state=final_state,
                **self.in_oracles_words(),
            )
        if self.preset == "apo_zero_unpaired":
            history = [{**line, "kl_pairs": 0} for line in history]  # the oracle pairs them all the same, for nothing
        return history

    def oracle_gradients(self, root: Path) -> dict[str, Tensor]:
        """Gradient of the first step's loss, by Hugging Face name."""
        policy, reference = (oracle.Llama.load(self.folder(root) / name) for name in (self.start, "reference"))
        for weight in policy.weights.values():
            weight.requires_grad_()
        words = oracle.Recipe(**self.in_oracles_words())
        batch = oracle.read_samples(self.folder(root) / self.start, root / "train.jsonl", SEQ_LENGTH)[:GLOBAL_BATCH]
        with one_thread():
            point = oracle.reference_point(policy, reference, batch, words)
            oracle.batch_outcome(policy, reference, batch, words, *point).loss.backward()
        return {name: weight.grad for name, weight in policy.weights.items() if weight.grad is not None}

    def tolerance(self, key: str, value: float) -> float:
        """Largest admissible deviation of a metric from the oracle's float64 ``value``."""
        # A log-ratio is the (float64) difference of two sums of rounded token log-probs; all errors pointing one way
        # bound it, and with it every mean of log-ratios: 3.2e-5 nats per sequence, or 9.5e-7 per token.
        log_ratio = 2 * TOKEN_ROUNDING * (1 if self.average else LONGEST_RESPONSE)
        absolute = {
            "kl": log_ratio,
            "rewards/chosen": self.beta * log_ratio,
            "rewards/rejected": self.beta * log_ratio,
            "rewards/margins": 2 * self.beta * log_ratio,
            "logps/chosen": LONGEST_RESPONSE * TOKEN_ROUNDING,
            "logps/rejected": LONGEST_RESPONSE * TOKEN_ROUNDING,
        }
        if key in absolute:
            return absolute[key] + RELATIVE * abs(value)
        return {"loss": RELATIVE, "grad_norm": GRADIENT}.get(key, 0.0) * abs(value)  # counts and hits are exact

    def deviations(self, ours: list[dict], wanted: list[dict]) -> list[str]:
        """Where ``ours`` leaves the tolerance around ``wanted``, line by line, for all keys of the latter."""
        found = [] if len(ours) == len(wanted) else [f"{len(ours)} lines for {len(wanted)}"]
        for step, (mine, line) in enumerate(zip(ours, wanted, strict=False), 1):
            for key, value in line.items():
                got = mine[key]
                if value is None or got is None:
                    wrong = value is not got
                else:
                    wrong = not abs(got - value) <= self.tolerance(key, value)
                if wrong:
                    found.append(f"step {step}, {key}: {got!r}, not {value!r}")
        return found


@contextmanager
def one_thread() -> Iterator[None]:
    """The oracle's products are tiny, and threads that wait for each other on cores that ranks use take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SGD = Recipe(optimizer="sgd", lr=0.02, weight_decay=0.0)
ADAM = Recipe(clip=2.5)  # clips some steps and leaves others
PAPER = replace(ADAM, preset="kto_paper")

# ------------------------------------------------------------------------------------------------ files

BLEND, COOLING = 0.1, 0.75


def make_files(root: Path) -> Path:
    """Write ``train.jsonl``, and a policy and a reference, with tied and untied embeddings, under ``root``."""
    for name in ("untied", "tied"):
        _make_models(root / name, tied=name == "tied")
    write_records(root / "train.jsonl", records())
    return root


def write_records(path: Path, rows: list[list[str]]) -> None:
    """Rows of prompt, response, label."""
    lines = [json.dumps(dict(zip(("prompt", "response", "preference"), row, strict=True))) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _make_models(folder: Path, *, tied: bool) -> None:
    """A reference, and a policy that differs from it in every weight.

    The policy lies on the way to another random model and is less sure of itself, so it gives random text more
    probability than the reference does: KL estimates come out positive, and the two constants set their size.
    """
    from safetensors.torch import load_file, save_file

    for seed, name in enumerate(["reference", "policy"]):
        tiny.make_model(folder / name, seed=seed, tie_word_embeddings=tied)
    reference, other = (load_file(folder / name / "model.safetensors") for name in ("reference", "policy"))
    blend = {name: tensor.lerp(other[name], BLEND) for name, tensor in reference.items()}
    blend["model.norm.weight"] *= COOLING
    save_file(blend, folder / "policy" / "model.safetensors", {"format": "pt"})


def records() -> list[list[str]]:
    """Five global batches, each with a trap in it, and a remainder that training drops: prompt, response, label."""
    rng = random.Random(5)

    def words(fewest: int, most: int) -> str:
        return " ".join(rng.choices(tiny.WORDS, k=rng.randint(fewest, most)))

    def rows(labels: str) -> list[list[str]]:
        names = {"+": "chosen", "-": "rejected"}
        return [["review: " + words(2, 8), " " + words(1, 16), names[label]] for label in labels]

    whole_classes = rows("----++-+")  # at DP 2 the first rank has one class only
    neighbours = rows("+-+--+-+")  # two answers to each prompt, and an answer given to four: partners are further on
    for i in (0, 2, 4, 6):
        neighbours[i + 1][0] = neighbours[i][0]
    for i in (2, 4, 5):
        neighbours[i][1] = neighbours[1][1]
    cut = rows("+--+-+--")  # a prompt so long that its partner's response is cut in the KL row
    cut[2][0], cut[2][1], cut[3][1] = "review: " + words(22, 22), " good", " " + words(24, 24)
    one_class = rows("--------")
    alone = rows("+-+--++-")  # the first has no partner: everyone else shares its prompt or its response
    for i in (1, 4, 6):
        alone[i][0] = alone[0][0]
    for i in (2, 3, 5, 7):
        alone[i][1] = alone[0][1]
    too_long = ["review: " + words(40, 40), " " + words(40, 40), "chosen"]  # dropped
    return [*whole_classes, *neighbours, too_long, *cut, *one_class, *alone, *rows("+-+")]


# ------------------------------------------------------------------------------------------------ on ranks


class Job:
    """What the NeMo model wires up, without NeMo and Lightning, on a rank that has joined its job.

    Args:
        overrides: of the shipped config.
    """

    def __init__(self, overrides: list[str]) -> None:
        from nemo_kto import launch
        from nemo_kto.checkpoint.base_identity import base_identity
        from nemo_kto.checkpoint.weights import load_weights
        from nemo_kto.config.architecture import read_architecture
        from nemo_kto.config.load import load_config
        from nemo_kto.data.tokenize import build_store
        from nemo_kto.gpt.build import build_gpt
        from nemo_kto.gpt.forward import Passes
        from nemo_kto.reference.columns import ReferenceColumns
        from nemo_kto.reference.host_weights import HostWeights
        from nemo_kto.reference.swap import SwapReference, WeightSwap
        from nemo_kto.training.optim import build_optimizer, float32_masters, wrap_data_parallel
        from nemo_kto.training.reference_cache import cached
        from nemo_kto.training.run_data import RunData
        from nemo_kto.training.step import KTOStep, loss_settings, score_size

        self.config = config = load_config(overrides)
        model, bf16, start = config.model, config.trainer.is_bf16, config.pretrained_checkpoint.restore_from_path
        reference = model.kto.reference_from_path
        self.groups = launch.start(model.tensor_model_parallel_size, model.pipeline_model_parallel_size)
        self.arch = read_architecture(start)
        self.chunks = wrap_data_parallel(build_gpt(self.arch, model, bf16=bf16, groups=self.groups), model.optim)
        load_weights(self.chunks, self.arch, reference, self.groups)
        self.swap = WeightSwap(self.chunks, HostWeights(self.chunks), model.kto.reference_restore)
        load_weights(self.chunks, self.arch, start, self.groups)
        self.optimizer = build_optimizer(self.chunks, model.optim, clip_grad=config.trainer.kto.gradient_clip_val)
        self.swap.use_masters(partial(float32_masters, self.optimizer))
        self.settings, passes = loss_settings(model.kto), Passes(self.chunks, self.groups, self.arch.vocab_size)
        scorer = SwapReference(self.swap, passes)
        if model.kto.reference == "cache":
            scorer = cached(config, self.arch, base_identity(reference), scorer, self.groups)
        columns = ReferenceColumns(scorer, size=score_size(model), needs_kl=self.settings.needs_kl)
        self.step = KTOStep(passes, columns, self.settings, self.groups, score_size(model))
        data = RunData(config, build_store(model.data.data_prefix.train, start, model.data), None, self.arch)
        self.batches = data.train_loader(0, dp_rank=self.groups.dp_rank, dp_size=self.groups.dp_size)

    def clear_gradients(self) -> None:
        """As before every step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def whole(self, pick: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """``pick`` of every parameter of this pipeline stage, under Hugging Face names, joined over TP."""
        from nemo_kto.checkpoint import hf_names
        from nemo_kto.gpt.build import unwrap

        found: dict[str, Tensor] = {}
        for name, parameter in (pair for chunk in self.chunks for pair in unwrap(chunk).global_parameters()):
            shard = pick(parameter).detach().contiguous()
            shards = [torch.empty_like(shard) for _ in range(self.groups.tp_size)]
            torch.distributed.all_gather(shards, shard, group=self.groups.tp)
            rule = hf_names.rule_for(self.arch, name)
            if rule.kind is hf_names.Kind.REPLICATED:
                assert all(torch.equal(shard, other) for other in shards), f"{name} differs over TP"
            found |= hf_names.assemble(rule, self.arch, shards)
        return found
