"""Small base models with adapters, as PEFT has them and as the package has them, and the logits of either."""

from __future__ import annotations

from pathlib import Path

import hf_models
import torch

from nemo_kto.checkpoint.base_identity import base_identity
from nemo_kto.checkpoint.hf_load import load_hf
from nemo_kto.checkpoint.saving import CheckpointWriter, Contents
from nemo_kto.checkpoint.sharded import Part
from nemo_kto.config.adapter_record import FILE, AdapterRecord
from nemo_kto.config.architecture import read_architecture
from nemo_kto.config.lora import LoraSpec
from nemo_kto.gpt import lora
from nemo_kto.gpt.build import PlainNetwork, build_gpt, unwrap

TOKENS, MASK = hf_models.batch(399, [50, 17, 41])


def write_peft(base: Path, out: Path, settings: dict) -> tuple[Path, torch.Tensor]:
    import transformers
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(out)
    return out, logits_of(model)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=MASK.long()).logits[MASK]


def loaded_by_peft(base: Path, adapters: Path) -> torch.nn.Module:
    import transformers
    from peft import PeftModel

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapters)).eval()


def base_logits(folder: Path) -> torch.Tensor:
    return hf_models.hf_logits(folder, TOKENS, MASK)[MASK]


def network(folder: Path, groups):
    arch = read_architecture(folder)
    (chunk,) = build_gpt(arch, PlainNetwork(), bf16=False, groups=groups)
    load_hf([chunk], arch, folder, groups)
    return chunk.eval(), arch


def megatron_logits(chunk) -> torch.Tensor:
    with torch.no_grad():
        return unwrap(chunk).logits(chunk(TOKENS, None, None)).transpose(0, 1)[MASK][:, :399]


def adapted(folder: Path, spec: LoraSpec, groups):
    """A network with adapters that are not 0."""
    chunk, arch = network(folder, groups)
    lora.attach([chunk], spec, groups)
    lora.initialize([chunk], groups, seed=5, column_init="xavier", row_init="normal")
    return chunk, arch


def save(chunk, folder: Path, spec: LoraSpec, out: Path, groups) -> Path:
    record = AdapterRecord(spec, str(folder), base_identity(folder))
    contents = Contents(folder, documents={FILE: record.to_json()}, part=Part.ADAPTERS)
    CheckpointWriter().save([chunk], contents, out, groups)
    return out


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()
