"""The runs that test_lora_cli.py looks at: trained, interrupted, carried to another layout, gone on from."""

from __future__ import annotations

from pathlib import Path

from train_runs import Run, train

TUNING = "model.peft.lora_tuning"
LORA = ("model.peft.peft_scheme=lora", f"{TUNING}.adapter_dim=4", f"{TUNING}.alpha=8", "model.optim.lr=1e-2")
WORDS = (
    *LORA,
    *("model.data.num_workers=2", "model.hidden_dropout=0.1", f"{TUNING}.adapter_dropout=0.1"),
    *("trainer.kto.save_interval=3", "exp_manager.checkpoint_callback_params.save_top_k=-1"),
)
STEP = "checkpoints/step-000006"


def whole(root: Path) -> Run:
    return train(root, "whole", *WORDS, "trainer.kto.max_steps=6")


def halves(root: Path) -> Run:
    train(root, "halves", *WORDS, "trainer.kto.max_steps=3")
    return train(root, "halves", *WORDS, "trainer.kto.max_steps=6")


def resharded(root: Path) -> tuple[Run, Run]:
    """Without dropout: six steps alone, and the last three of them again on two ranks."""
    words = (*LORA, "trainer.kto.save_interval=3", "trainer.kto.limit_val_batches=0")
    alone = train(root, "alone", *words, "trainer.kto.max_steps=6")
    start = "exp_manager.resume_from_checkpoint=alone/checkpoints/step-000003"
    layout = ("trainer.devices=2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
    return alone, train(root, "resharded", *words, *layout, start, "trainer.kto.max_steps=6")


def gone_on(root: Path) -> dict[str, Run]:
    """A second training that starts from the adapters of the first, held to the base, and to base + adapters."""
    earlier = (*LORA, f"model.peft.restore_from_path=alone/{STEP}", "trainer.kto.max_steps=2")
    earlier += ("trainer.kto.limit_val_batches=0", "model.optim.sched.warmup_steps=0")
    swap = train(root, "swap", *earlier, "model.kto.reference=swap")
    first = (root / "swap" / "metrics.jsonl").read_text()
    lost = ("model.peft.restore_from_path=nowhere", "trainer.kto.max_steps=3")
    resumed = train(root, "swap", *earlier, "model.kto.reference=swap", *lost)
    assert (root / "swap" / "metrics.jsonl").read_text().startswith(first)
    return {"off": train(root, "off", *earlier), "swap": swap, "resumed": resumed}


def make_apart(base: Path, out: Path) -> None:
    """Adapters that PEFT begins, where q, k and v have an A each, so that the fused layer has three times the rank."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=modules)
    )
    model.save_pretrained(out)
