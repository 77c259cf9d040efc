"""The oracle of LoRA: Hugging Face's PEFT on transformers' Llama, float64, one row at a time, no parallelism.

The objective, the data and the optimizer are those of ``oracle.py``. It shares no code with the package.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import oracle
import torch
from lora_runs import APART, EARLIER, MODULES, STEPS, TARGETS, LoraRecipe
from torch import Tensor
from trajectory import GLOBAL_BATCH, SEQ_LENGTH, one_thread


class PeftPolicy:
    """PEFT's LoRA on a base model. What Megatron fuses into one layer shares one A, as it does there.

    Args:
        base: Hugging Face directory.
        recipe: which adapters.
        apart: these modules instead of the recipe's, with an A each.
    """

    def __init__(self, base: Path, recipe: LoraRecipe, apart: tuple[str, ...] = ()) -> None:
        import transformers
        from peft import LoraConfig, get_peft_model

        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        _norms_in_float64(model)
        modules = [name.rsplit(".", 1)[1] for target in recipe.targets for name in TARGETS[target]]
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            lora_dropout=0.0,
            target_modules=list(apart) or modules,
            layers_to_transform=None if recipe.layers is None else [layer - 1 for layer in recipe.layers],
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(model, config).eval()
        assert {parameter.dtype for parameter in self.model.parameters()} == {torch.float64}
        if not apart:
            self._tie()

    def _tie(self) -> None:
        for layer in self.model.base_model.model.model.layers:
            for modules in MODULES.values():
                first, *others = (layer.get_submodule(name) for name in modules)
                for other in others if hasattr(first, "lora_A") else ():
                    other.lora_A["default"].weight = first.lora_A["default"].weight

    def logits(self, ids: list[int]) -> Tensor:
        """[S, V] of one sequence."""
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    def adapters(self, *, gradients: bool = False) -> dict[str, Tensor]:
        """Every half under its name in PEFT's files; a shared A under the name of each module."""
        return {
            name.replace(".default.", "."): (parameter.grad if gradients else parameter).detach().clone()
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if parameter.requires_grad
        }

    def trained(self) -> list[Tensor]:
        """Each once."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def fill(self, start: dict[str, Tensor]) -> None:
        """Put matrices by PEFT's names into it, all of them."""
        named = {
            name.replace(".default.", "."): parameter
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if parameter.requires_grad
        }
        assert named.keys() == start.keys()
        for name, tensor in start.items():
            named[name].copy_(tensor)


class Without:
    """The base model of a policy. Recipes share it, and each sequence is computed once.

    Args:
        policy: with adapters.
        known: logits by sequence.
    """

    def __init__(self, policy: PeftPolicy, known: dict[tuple[int, ...], Tensor]) -> None:
        self._policy, self._known = policy, known

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        key = tuple(ids)
        if key not in self._known:
            with self._policy.model.disable_adapter():
                self._known[key] = self._policy.logits(ids)
        return self._known[key]


_KNOWN: defaultdict[Path, dict[tuple[int, ...], Tensor]] = defaultdict(dict)


def _norms_in_float64(model: torch.nn.Module) -> None:
    """transformers computes them in float32 whatever the model's dtype is, and that rounding is not the oracle's."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.numel(), eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)


def write_earlier(root: Path, recipe: LoraRecipe) -> None:
    """Adapters as if of earlier trainings, in directories that PEFT writes: with A shared, and apart."""
    for name, apart in ((EARLIER, ()), (APART, ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))):
        policy = PeftPolicy(recipe.base(root), recipe, apart)
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in policy.trained():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        policy.model.save_pretrained(root / name)


@dataclass(frozen=True)
class Outcome:
    """What the oracle made of a recipe: metrics by step, and adapters by PEFT's names."""

    history: list[dict]
    gradients: dict[str, Tensor]
    start: dict[str, Tensor]
    adapters: dict[str, Tensor]


def run_lora_oracle(recipe: LoraRecipe, root: Path, start: dict[str, Tensor]) -> Outcome:
    """Train ``recipe`` from the adapters ``start``; gradients are those of the first step."""
    words = oracle.Recipe(**recipe.objective.in_oracles_words())
    base = recipe.base(root)
    policy = PeftPolicy(base, recipe)
    policy.fill(start)
    reference: PeftPolicy | Without = Without(policy, _KNOWN[base])
    if recipe.reference == "swap":
        reference = PeftPolicy(base, recipe)
        reference.fill(start)
    samples = oracle.read_samples(base, root / "train.jsonl", SEQ_LENGTH)
    optimizer = oracle.make_optimizer(policy.trained(), words)
    history, gradients = [], {}
    with one_thread():
        for step in range(STEPS):
            first = step % (len(samples) // GLOBAL_BATCH) * GLOBAL_BATCH
            batch = samples[first : first + GLOBAL_BATCH]
            point = oracle.reference_point(policy, reference, batch, words)
            outcome = oracle.batch_outcome(policy, reference, batch, words, *point)
            optimizer.zero_grad()
            outcome.loss.backward()
            gradients = gradients or policy.adapters(gradients=True)
            norm = oracle.clip_gradients(policy.trained(), words.clip)
            optimizer.step()
            history.append(oracle.metrics(batch, outcome, norm, words.beta))
    return Outcome(history, gradients, start, policy.adapters())
