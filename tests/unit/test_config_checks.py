"""Every check of a config beyond types, with the message that names its key and the fix."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from nemo_kto.config import checks
from nemo_kto.config.architecture import Architecture, read_architecture
from nemo_kto.config.load import load_config
from nemo_kto.errors import ConfigError

HERE = str(Path(__file__).parent)
GIVEN = [f"pretrained_checkpoint.restore_from_path={HERE}", "model.data.data_prefix.train=[a.jsonl]"]
TP, PP = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"
RECOMPUTE = "model.activations_checkpoint"
CALLBACK = "exp_manager.checkpoint_callback_params"

LORA, TUNING = ["model.peft.peft_scheme=lora"], "model.peft.lora_tuning"
CASES = [
    # trainer
    (["trainer.accelerator=tpu"], 1, "trainer.accelerator=tpu is not one of auto, gpu, cpu"),
    (["trainer.precision=16"], 1, "trainer.precision=16 is not one of 32, 32-true, bf16, bf16-mixed, bf16-true"),
    (["trainer.devices=0"], 1, "trainer.devices=0 must be at least 1"),
    (["trainer.num_nodes=0"], 1, "trainer.num_nodes=0 must be at least 1"),
    (["trainer.join_timeout_minutes=0"], 1, "trainer.join_timeout_minutes=0.0 must be above 0"),
    (
        ["trainer.distributed_timeout_minutes=0.5"],
        1,
        "trainer.distributed_timeout_minutes=0.5 must be at least 1",
    ),
    # trainer.kto
    (["trainer.kto.max_epochs=0"], 1, "trainer.kto.max_epochs=0 must be at least 1"),
    (["trainer.kto.save_interval=0"], 1, "trainer.kto.save_interval=0 must be at least 1"),
    (["trainer.kto.gradient_clip_val=-1"], 1, "trainer.kto.gradient_clip_val=-1.0 must be at least 0"),
    (["trainer.kto.max_consecutive_skips=-1"], 1, "trainer.kto.max_consecutive_skips=-1 must be at least 0"),
    (["trainer.kto.max_steps=0"], 1, "trainer.kto.max_steps=0 must be at least 1"),
    (["trainer.kto.max_steps=-2"], 1, "trainer.kto.max_steps=-2 must be at least 1"),
    (
        ["trainer.kto.val_check_interval=1.5"],
        1,
        "trainer.kto.val_check_interval=1.5 is a fraction: give",
    ),
    (["trainer.kto.val_check_interval=0"], 1, "trainer.kto.val_check_interval=0 must be at least 1"),
    (["trainer.kto.limit_train_batches=0.0"], 1, "trainer.kto.limit_train_batches=0.0 is a fraction"),
    (["trainer.kto.limit_val_batches=-1"], 1, "trainer.kto.limit_val_batches=-1 must be at least 0"),
    # exp_manager
    ([f"{CALLBACK}.monitor=loss"], 1, f"{CALLBACK}.monitor=loss is not one of val_loss, val/loss"),
    ([f"{CALLBACK}.mode=best"], 1, f"{CALLBACK}.mode=best is not one of min, max"),
    ([f"{CALLBACK}.save_top_k=-2"], 1, f"{CALLBACK}.save_top_k=-2 must be at least -1"),
    (["exp_manager.max_time_per_run='00:00:00:00'"], 1, "exp_manager.max_time_per_run=00:00:00:00 leaves no time"),
    (["exp_manager.profile_steps=[3,2]"], 1, "exp_manager.profile_steps=[3, 2] is not [first, last]"),
    (["exp_manager.profile_steps=[0,2]"], 1, "exp_manager.profile_steps=[0, 2] is not [first, last]"),
    (["exp_manager.max_time_per_run='3:50'"], 1, 'exp_manager.max_time_per_run=3:50 is not "DD:HH:MM:SS"'),
    # model
    (
        ["model.micro_batch_size=0", "model.kto.log_prob_forward_micro_batch_size=1"],
        1,
        "model.micro_batch_size=0 must be at least 1",
    ),
    ([f"{TP}=-1", "model.sequence_parallel=true"], 1, f"{TP}=-1 must be at least 1"),
    ([f"{TP}=0"], 1, f"{TP}=0 must be at least 1"),
    ([f"{PP}=0"], 1, f"{PP}=0 must be at least 1"),
    (["model.global_batch_size=1"], 1, "model.global_batch_size=1: KTO pairs each prompt with another sample"),
    (["model.hidden_dropout=1.0"], 1, "model.hidden_dropout=1.0 must be in [0, 1)"),
    (["model.attention_dropout=-0.1"], 1, "model.attention_dropout=-0.1 must be in [0, 1)"),
    (["model.context_parallel_size=2"], 2, "model.context_parallel_size: context parallelism is not available, use 1"),
    (
        ["model.virtual_pipeline_model_parallel_size=2"],
        1,
        "model.virtual_pipeline_model_parallel_size: not available yet, use null",
    ),
    (["model.peft.peft_scheme=ia3"], 1, "model.peft.peft_scheme=ia3 is not one of none, lora"),
    (["model.peft.restore_from_path=x"], 1, "model.peft.restore_from_path needs model.peft.peft_scheme=lora"),
    ([*LORA, "model.kto.reference=swap"], 1, "takes base + an earlier adapter as the reference: set model.peft.rest"),
    ([*LORA, "model.kto.reference_from_path=/"], 1, "model.kto.reference_from_path with LoRA: the reference is the"),
    ([*LORA, f"{TUNING}.target_modules=[q_proj]"], 1, f"{TUNING}.target_modules=['q_proj']: choose some of attention"),
    ([*LORA, f"{TUNING}.target_modules=[]"], 1, f"{TUNING}.target_modules=[]: choose some of attention_qkv"),
    ([*LORA, f"{TUNING}.adapter_dim=0"], 1, f"{TUNING}.adapter_dim=0 must be at least 1"),
    ([*LORA, f"{TUNING}.alpha=0"], 1, f"{TUNING}.alpha=0.0 must be above 0, or null for adapter_dim"),
    ([*LORA, f"{TUNING}.adapter_dropout=1"], 1, f"{TUNING}.adapter_dropout=1.0 must be in [0, 1)"),
    ([*LORA, f"{TUNING}.column_init_method=kaiming"], 1, f"{TUNING}.column_init_method=kaiming is not one of xavier"),
    ([*LORA, f"{TUNING}.row_init_method=one"], 1, f"{TUNING}.row_init_method=one is not one of xavier"),
    ([*LORA, f"{TUNING}.column_init_method=zero"], 1, "are both zero, so no gradient would ever reach either"),
    ([*LORA, f"{TUNING}.layer_selection=[0]"], 1, f"{TUNING}.layer_selection=[0]: list decoder layers, counted from"),
    ([*LORA, f"{TUNING}.layer_selection=[]"], 1, f"{TUNING}.layer_selection=[]: list decoder layers, counted from 1"),
    ([f"{RECOMPUTE}_granularity=some"], 1, f"{RECOMPUTE}_granularity=some is not one of null, selective, full"),
    (
        [f"{RECOMPUTE}_granularity=full", f"{RECOMPUTE}_num_layers=1"],
        1,
        f"{RECOMPUTE}_method must be uniform or block",
    ),
    ([f"{RECOMPUTE}_granularity=full", f"{RECOMPUTE}_method=block"], 1, f"{RECOMPUTE}_num_layers must be set"),
    ([f"{RECOMPUTE}_num_layers=1"], 1, f"{RECOMPUTE}_method and _num_layers belong to"),
    (
        [f"{RECOMPUTE}_granularity=full", f"{RECOMPUTE}_method=block", f"{RECOMPUTE}_num_layers=0"],
        1,
        f"{RECOMPUTE}_num_layers=0 must be at least 1",
    ),
    # model.kto
    (["model.kto.kl_clamp=none"], 1, "model.kto.kl_clamp=none is not one of per_sample, batch_mean"),
    (["model.kto.loss_normalization=sum"], 1, "model.kto.loss_normalization=sum is not one of per_class, per_batch"),
    (["model.kto.loss_type=dpo"], 1, "model.kto.loss_type=dpo is not one of kto, apo_zero_unpaired"),
    (
        ["model.kto.reference=adapters_off"],
        1,
        "model.kto.reference=adapters_off needs adapters: set model.peft.peft_scheme=lora, or use swap",
    ),
    (["model.kto.reference=mirror"], 1, "model.kto.reference=mirror is not one of auto, swap, adapters_off, cache"),
    (["model.kto.ref_policy_kl_penalty=0"], 1, "model.kto.ref_policy_kl_penalty=0.0 must be above 0"),
    (["model.kto.desirable_loss_weight=-1"], 1, "model.kto.desirable_loss_weight=-1.0 must be at least 0"),
    (["model.kto.undesirable_loss_weight=-1"], 1, "model.kto.undesirable_loss_weight=-1.0 must be at least 0"),
    (["model.kto.preference_loss_weight=-1"], 1, "model.kto.preference_loss_weight=-1.0 must be at least 0"),
    (["model.kto.sft_loss_weight=-1"], 1, "model.kto.sft_loss_weight=-1.0 must be at least 0"),
    (
        ["model.kto.log_prob_forward_micro_batch_size=0"],
        1,
        "model.kto.log_prob_forward_micro_batch_size=0 must be at least 1",
    ),
    (["model.kto.preference_loss_weight=0"], 1, "model.kto: preference_loss_weight and sft_loss_weight are both 0"),
    (
        ["model.kto.desirable_loss_weight=0", "model.kto.undesirable_loss_weight=0"],
        1,
        "model.kto: desirable_loss_weight and undesirable_loss_weight are both 0",
    ),
    # model.optim
    (["model.optim.name=lion"], 1, "model.optim.name=lion is not one of distributed_fused_adam, adamw, sgd"),
    (["model.optim.sched.name=poly"], 1, "model.optim.sched.name=poly is not one of CosineAnnealing"),
    (["model.optim.lr=0", "model.optim.sched.min_lr=0"], 1, "model.optim.lr=0.0 must be above 0"),
    (["model.optim.eps=0"], 1, "model.optim.eps=0.0 must be above 0"),
    (["model.optim.weight_decay=-1"], 1, "model.optim.weight_decay=-1.0 must be at least 0"),
    (["model.optim.momentum=-1"], 1, "model.optim.momentum=-1.0 must be at least 0"),
    (["model.optim.sched.warmup_steps=-1"], 1, "model.optim.sched.warmup_steps=-1 must be at least 0"),
    (["model.optim.sched.constant_steps=-1"], 1, "model.optim.sched.constant_steps=-1 must be at least 0"),
    (["model.optim.sched.min_lr=-1"], 1, "model.optim.sched.min_lr=-1.0 must be at least 0"),
    (["model.optim.betas=[0.9]"], 1, "model.optim.betas=[0.9] must be two numbers in [0, 1)"),
    (["model.optim.betas=[0.9,1.0]"], 1, "model.optim.betas=[0.9, 1.0] must be two numbers in [0, 1)"),
    (["model.optim.sched.min_lr=1"], 1, "model.optim.sched.min_lr=1.0 is above model.optim.lr=9e-06"),
    (["model.optim.overlap_param_sync=true"], 1, "model.optim.overlap_param_sync needs"),
    # model.data
    (["model.data.overlong=cut"], 1, "model.data.overlong=cut is not one of drop, truncate, error"),
    (["model.data.seq_length=1"], 1, "model.data.seq_length=1 must be at least 2"),
    (["model.data.num_workers=-1"], 1, "model.data.num_workers=-1 must be at least 0"),
    (["model.data.tokenize_workers=0"], 1, "model.data.tokenize_workers=0 must be at least 1"),
    (["model.data.data_prefix.train=[]"], 1, "model.data.data_prefix.train is empty: list at least one file"),
    (
        ["model.sequence_parallel=true", f"{TP}=2", "model.data.seq_length=101"],
        2,
        f"model.data.seq_length=101 is not a multiple of {TP}=2",
    ),
    # every number
    (["model.optim.lr=inf"], 1, "model.optim.lr=inf must be a finite number"),
    # layout
    (["model.sequence_parallel=true"], 1, f"model.sequence_parallel=true needs {TP} above 1"),
    (
        [f"{TP}=2", f"{PP}=2"],
        6,
        f"world size 6 is not a multiple of {TP} 2 x {PP} 2 = 4: start a multiple of 4 processes, or make TP x PP one "
        "of 1, 2, 3, 6 (world 6 = 1 node x 6)",
    ),
    (
        ["model.micro_batch_size=3"],
        8,
        "model.global_batch_size 64 is not a multiple of model.micro_batch_size 3 x data_parallel 8 "
        "(world 8 / (TP 1 x PP 1)) = 24: take 48 or 72",
    ),
    # paths
    (["model.kto.reference_from_path=/no/where"], 1, "model.kto.reference_from_path=/no/where does not exist"),
    (["exp_manager.resume_from_checkpoint=/no/where"], 1, "exp_manager.resume_from_checkpoint=/no/where does not"),
    (
        [f"pretrained_checkpoint.restore_from_path={__file__}"],
        1,
        f"pretrained_checkpoint.restore_from_path={__file__} is not a directory: give a Hugging Face or Megatron "
        "checkpoint directory, or a .nemo file",
    ),
    (
        [f"exp_manager.resume_from_checkpoint={__file__}"],
        1,
        f"exp_manager.resume_from_checkpoint={__file__} is not a directory",
    ),
]


@pytest.mark.parametrize(("overrides", "world", "message"), CASES, ids=lambda value: str(value)[:60])
def test_a_check_names_its_key_and_the_fix(overrides, world, message):
    with pytest.raises(ConfigError) as refused:
        checks.check(load_config([*GIVEN, *overrides]), world)
    lines = str(refused.value).splitlines()
    assert len(lines) == 1, "one mistake, one line"
    assert message in lines[0]


def test_every_message_of_the_checks_is_in_the_table():
    """Literal parts of all messages of the module, each in some case above or below."""
    source = Path(inspect.getsourcefile(checks)).read_text()
    everything = " ".join(message for *_, message in CASES) + ELSEWHERE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Yield) and isinstance(node.value, ast.Constant | ast.JoinedStr):
            parts = node.value.values if isinstance(node.value, ast.JoinedStr) else [node.value]
            literal = max((p.value for p in parts if isinstance(p, ast.Constant)), key=len)
            assert literal.strip()[:16] in everything, f"no case for {literal!r} (line {node.lineno})"


ELSEWHERE = "data_parallel | must be at least"


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError) as refused:
        checks.check(load_config([*GIVEN, "model.optim.eps=0", "model.seed=1", "trainer.devices=0"]), 1)
    assert str(refused.value) == "trainer.devices=0 must be at least 1\nmodel.optim.eps=0.0 must be above 0"


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.kto.max_steps=-1", "trainer.kto.limit_val_batches=0"],
        ["trainer.kto.limit_val_batches=0.0", "trainer.kto.gradient_clip_val=0"],
        ['exp_manager.max_time_per_run="00:03:50:00"', f"{CALLBACK}.save_top_k=-1"],
        ["model.kto.preference_loss_weight=0", "model.kto.sft_loss_weight=1", "model.kto.desirable_loss_weight=0"],
        ["model.optim.sched.name=Constant", "model.optim.sched.min_lr=1"],
        ["model.optim.overlap_param_sync=true", "model.optim.overlap_grad_sync=true"],
        [f"{RECOMPUTE}_granularity=full", f"{RECOMPUTE}_method=uniform", f"{RECOMPUTE}_num_layers=1"],
    ],
)
def test_what_makes_sense_passes(overrides):
    checks.check(load_config([*GIVEN, *overrides]), 1)


def test_an_archive_is_a_model_but_no_checkpoint(tmp_path):
    archive = tmp_path / "model.nemo"
    archive.touch()
    words = [f"pretrained_checkpoint.restore_from_path={archive}", f"model.kto.reference_from_path={archive}"]
    checks.check(load_config([*GIVEN, *words]), 1)
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint=.* is not a directory"):
        checks.check(load_config([*GIVEN, f"exp_manager.resume_from_checkpoint={archive}"]), 1)


@pytest.mark.parametrize("layout", ["laptop", "1gpu", "8gpu", "32gpu"])
def test_shipped_layouts_fit_their_machines(layout):
    checks.check(load_config([*GIVEN, f"layout={layout}"]), {"8gpu": 8, "32gpu": 32}.get(layout, 1))


@pytest.mark.parametrize(("warmup", "constant", "fits"), [(4, 5, True), (5, 5, False), (0, 10, False), (10, 0, False)])
def test_a_schedule_needs_room(warmup, constant, fits):
    words = [f"model.optim.sched.warmup_steps={warmup}", f"model.optim.sched.constant_steps={constant}"]
    optim = load_config([*GIVEN, *words]).model.optim
    if fits:
        checks.check_schedule(optim, 10)
        return
    with pytest.raises(
        ConfigError, match=rf"warmup_steps {warmup} \+ constant_steps {constant} leave nothing of the 10"
    ):
        checks.check_schedule(optim, 10)


def test_a_constant_rate_has_no_tail():
    words = ["model.optim.sched.name=Constant", "model.optim.sched.constant_steps=99"]
    checks.check_schedule(load_config([*GIVEN, *words, "model.optim.sched.warmup_steps=0"]).model.optim, 10)


def architecture(positions: int, window: int | None = None) -> Architecture:
    sizes = dict.fromkeys(("num_layers", "num_attention_heads", "num_query_groups", "head_dim"), 4)
    more = {"hidden_size": 16, "ffn_hidden_size": 16, "vocab_size": 99, "norm_epsilon": 1e-5, "rope_theta": 1e4}
    flags = {"tied_embeddings": False, "qkv_bias": False, "qk_norm": False, "rope_scaling": None}
    return Architecture("llama", **sizes, **more, **flags, max_position_embeddings=positions, sliding_window=window)


def test_rows_must_fit_the_model():
    checks.check_length(architecture(256), 256)
    with pytest.raises(ConfigError, match=r"model.data.seq_length=257 is above the model's max_position_emb"):
        checks.check_length(architecture(256), 257)
    with pytest.raises(ConfigError, match=r"model.data.seq_length=129 is above the model's sliding_window 128"):
        checks.check_length(architecture(256, window=128), 129)


@pytest.mark.parametrize(("method", "unit", "pipeline"), [("uniform", 3, 1), ("block", 5, 1), ("uniform", 4, 2)])
def test_recomputed_units_must_fit_a_stage(tiny_llama, method, unit, pipeline):
    config = load_config(
        [
            *GIVEN,
            "model.activations_checkpoint_granularity=full",
            f"model.activations_checkpoint_method={method}",
            f"model.activations_checkpoint_num_layers={unit}",
            f"{PP}={pipeline}",
        ]
    )
    with pytest.raises(ConfigError, match=f"activations_checkpoint_num_layers={unit} does not fit the"):
        checks.check_recompute(read_architecture(tiny_llama), config.model)


def test_a_trace_begins_within_the_run():
    for steps in (None, [10, 12], [1, 1]):
        checks.check_profile(steps, 10)
    with pytest.raises(ConfigError, match=r"profile_steps=\[11, 12\] begins after the last of this run's 10 steps"):
        checks.check_profile([11, 12], 10)
