"""The table of bad inputs: what is given, the exit code, and what the message must hold."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nemo_kto.data.problems import MAX_LISTED

TP, PP = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"
TRAIN, VALIDATION = "model.data.data_prefix.train", "model.data.data_prefix.validation"
MODEL, OUT = "pretrained_checkpoint.restore_from_path", "exp_manager.explicit_log_dir"
CONFIG, FILES = 2, 3
LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_NNODES", "SLURM_JOB_ID", "SLURM_STEP_NODELIST"),
)
locked = pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")


@dataclass(frozen=True)
class Bad:
    """One bad input.

    Attributes:
        words: a command line whose first word is the verb, or overrides for a training that would work without them.
        code: how the command must exit.
        fragments: what the message must hold: the key or file:line, and the fix.
        environment: variables that it meets.
    """

    words: tuple[str, ...]
    code: int
    fragments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """The command line."""
        verbs = ("score", "convert", "prepare", "report", "train")
        return list(self.words) if self.words[:1] and self.words[0] in verbs else ["train", *overrides(*self.words)]


def overrides(*words: str) -> list[str]:
    """A training that would work, but for ``words``."""
    given = [f"{MODEL}=model", f"{TRAIN}=[good.jsonl]", "model.global_batch_size=4", "model.data.seq_length=64"]
    given += [f"{OUT}=out", "model.data.cache_dir=cache", "model.data.tokenize_workers=1"]
    given += ["trainer.precision=32", "model.optim.sched.warmup_steps=1"]
    keys = {word.split("=")[0] for word in words}
    return [*[word for word in given if word.split("=")[0] not in keys], *words]


def files_of(here: Path) -> dict[str, tuple[int, int]]:
    """Everything in ``here`` but caches, with its length and time."""
    files = (path for path in here.rglob("*") if path.is_file() and path.relative_to(here).parts[0] != "cache")
    return {str(path.relative_to(here)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def check_said(bad: Bad, code: int, text: str) -> None:
    """One message, that names what it must."""
    assert code == bad.code, text
    assert "Traceback" not in text
    said = [line for line in text.splitlines() if not line.startswith(("info: ", "warning: "))]
    assert "\n".join(said).count("error: ") == 1, text
    for fragment in bad.fragments:
        assert fragment in "\n".join(said)
    if said[0].startswith("usage: "):  # argparse prints how the verb is used
        assert ": error: " in said[-1]
        return
    assert said[0].startswith("error: ")
    most = MAX_LISTED + 2 if said[0].endswith(":") else 1  # a title, the problems, and what to do or how many more
    assert len(said) <= most, text


def config(*words: str, says: tuple[str, ...], **environment: str) -> Bad:
    return Bad(words, CONFIG, says, environment)


def files(*words: str, says: tuple[str, ...], **environment: str) -> Bad:
    return Bad(words, FILES, says, environment)


def _line(name: str, *says: str) -> Bad:
    """A training file with a bad line."""
    return files(f"{TRAIN}=[{name}]", says=(f"{name}:{says[0]}", *says[1:]))


def _model(name: str, *says: str, **more: str) -> Bad:
    return files(f"{MODEL}={name}", *[f"{key}={value}" for key, value in more.items()], says=(name, *says))


ASKED = {
    "unknown key": config("model.optim.learning_rate=1", says=("unknown config key model.optim.learning_rate",)),
    "near miss": config("model.kto.kl_klamp=per_sample", says=("did you mean model.kto.kl_clamp?",)),
    "type": config("model.global_batch_size=many", says=("model.global_batch_size: Value 'many'",)),
    "fraction": config("model.micro_batch_size=1.5", says=("model.micro_batch_size: Value '1.5'",)),
    "switch": config("model.data.shuffle=perhaps", says=("model.data.shuffle: Value 'perhaps'",)),
    "no list": config(f"{TRAIN}=good.jsonl", says=(f"{TRAIN} must be a list",)),
    "no files": config(f"{TRAIN}=[]", says=(f"{TRAIN} is empty", "list at least one file")),
    "no override": config("model.seed", says=("'model.seed' is not key=value",)),
    "bracket": config(f"{TRAIN}=[good.jsonl", says=("is not key=value; quote brackets",)),
    "group": config("model.optim=adam", says=("model.optim",)),
    "interpolation": config("model.seed=${nothing}", says=("nothing",)),
    "preset": config("loss=dpo", says=("loss/dpo", "apo_zero_unpaired kto kto_paper")),
    "layout": config("layout=9gpu", says=("layout/9gpu", "8gpu")),
    "no cache": config(
        "model.kto.reference_cache_dir=x", says=("model.kto.reference_cache_dir=x is of model.kto.reference=cache",)
    ),
    "other adapters": config("model.peft.peft_scheme=ia3", says=("model.peft.peft_scheme=ia3 is not one of",)),
    "no layer": config(
        *("model.peft.peft_scheme=lora", "model.peft.lora_tuning.layer_selection=[99]"),
        says=("there is no layer 99",),
    ),
    "empty stage": config(
        *("model.peft.peft_scheme=lora", "model.peft.lora_tuning.layer_selection=[1]"),
        *("model.pipeline_model_parallel_size=2", "trainer.devices=2"),
        says=("gives pipeline stage 1", "no adapter: select a layer of every stage"),
    ),
    "no adapters there": files(
        *("model.peft.peft_scheme=lora", "model.peft.restore_from_path=model"),
        says=("model holds no adapters", "adapters.json"),
    ),
    "context": config("model.context_parallel_size=2", says=("model.context_parallel_size", "use 1")),
    "precision": config("trainer.precision=16", says=("trainer.precision=16 is not one of 32,",)),
    "rate": config("model.optim.eps=0", says=("model.optim.eps=0.0 must be above 0",)),
    "no number": config(
        "model.optim.weight_decay=inf", says=("model.optim.weight_decay=inf must be a finite number",)
    ),
    "optimizer": config("model.optim.name=lion", says=("model.optim.name=lion is not one of",)),
    "dropout": config("model.hidden_dropout=1.0", says=("model.hidden_dropout=1.0 must be in [0, 1)",)),
    "weights": config(
        *("model.kto.desirable_loss_weight=0", "model.kto.undesirable_loss_weight=0"),
        says=("desirable_loss_weight and undesirable_loss_weight are both 0",),
    ),
    "batch of one": config("model.global_batch_size=1", says=("model.global_batch_size=1", "at least 2")),
    "arithmetic": config(
        *("model.global_batch_size=8", "model.micro_batch_size=3"),
        says=("model.global_batch_size 8 is not a multiple of model.micro_batch_size 3 x data_parallel 1",),
    ),
    "ranks": config("trainer.devices=3", says=("model.global_batch_size 4 is not a multiple of", "data_parallel 3")),
    "world": config(f"{TP}=2", says=("world size 1 is not a multiple of", "= 2: start a multiple of 2 processes")),
    "heads": config(*("trainer.devices=3", f"{TP}=3"), says=(f"{TP}=3 does not divide", "4 attention heads % 3 = 1")),
    "layers": config(*("trainer.devices=3", f"{PP}=3"), says=(f"{PP}=3 does not divide", "Sizes that do: 1, 2, 4")),
    "sequence": config("model.sequence_parallel=true", says=("model.sequence_parallel=true needs", TP)),
    "length": config("model.data.seq_length=300", says=("model.data.seq_length=300", "max_position_embeddings 256")),
    "schedule": config(
        *("trainer.kto.max_steps=4", "model.optim.sched.warmup_steps=4"),
        says=("model.optim.sched: warmup_steps 4", "the 4 steps of this run", "train longer"),
    ),
    "nodes": config("trainer.num_nodes=2", says=("trainer.num_nodes=2", "one torchrun per node")),
    "time": config("exp_manager.max_time_per_run=1h", says=("exp_manager.max_time_per_run=1h", "DD:HH:MM:SS")),
    "no yaml": config("--config-name", "mine", "--config-dir", "nothing", says=("nothing holds no mine.yaml",)),
    "garbled yaml": config("--config-name", "garbled", "--config-dir", ".", says=("garbled.yaml", "line 3")),
    "bare yaml": config(
        "--config-name",
        "alone",
        "--config-dir",
        ".",
        says=("the yaml does not have the group above it", "begin it with `defaults: [gpt_kto"),
    ),
    "stray yaml": config(
        "--config-name", "stray", "--config-dir", ".", says=("model.sead", "did you mean model.seed")
    ),
    "no model": config(f"{MODEL}=null", says=(f"{MODEL} is not set",)),
    "model not there": config(f"{MODEL}=gone", says=(f"{MODEL}=gone does not exist",)),
    "model is a file": config(f"{MODEL}=a_file", says=(f"{MODEL}=a_file is not a directory",)),
    "other reference": config(
        "model.kto.reference_from_path=deeper", says=("model.kto.reference_from_path=deeper", "num_layers is 8, not 4")
    ),
}

DATA = {
    "no file": _line("gone.jsonl", " does not exist"),
    "dangling": _line("dangling.jsonl", " does not exist"),
    "empty file": _line("empty.jsonl", " is empty"),
    "blank lines": _line("blank.jsonl", " holds only blank lines"),
    "kind of file": _line("data.csv", " is of an unknown kind", ".parquet"),
    "folder": _line("folder.jsonl", " is a directory"),
    "twice": files(f"{TRAIN}=[good.jsonl,good.jsonl]", says=("good.jsonl: is listed twice",)),
    "not json": _line("not_json.jsonl", "3: not JSON", "column 2"),
    "nan": _line("nan.jsonl", "1: not JSON (NaN"),
    "doubled key": _line("doubled.jsonl", "1: not JSON (key 'prompt' appears twice)"),
    "deep": _line("deep.jsonl", "1: not JSON"),
    "no object": _line("no_object.jsonl", "2: is a list; want a JSON object"),
    "one array": _line("one_array.jsonl", "1: not JSON", "one JSON object per line"),
    "no keys": _line("no_keys.jsonl", "2: has no prompt"),
    "pairs": _line("pairs.jsonl", "1", "split the pair into two records"),
    "two spellings": _line("mixed.jsonl", "1: mixes two spellings (response, label)"),
    "label": _line("label.jsonl", "2: preference is 'good'", '"chosen", "rejected", 1, 0'),
    "rating": _line("rating.jsonl", "2: preference is 5", '"chosen", "rejected", 1, 0'),
    "no prompt": _line("empty_prompt.jsonl", "1: prompt is empty"),
    "no response": _line("empty_response.jsonl", "1: response is empty"),
    "number": _line("number.jsonl", "1: prompt is a number; want a string or a list of chat messages"),
    "half a character": _line("half.jsonl", "1: prompt holds half a surrogate pair"),
    "role": _line("chat.jsonl", "1: prompt[0].role is 'robot'"),
    "no content": _line("no_content.jsonl", "1: prompt[0] has no content"),
    "tool calls": _line("tools.jsonl", "1: prompt[0] has 'tool_calls', which is not supported"),
    "last word": _line("last_word.jsonl", "1: prompt ends with a message of the assistant"),
    "list and string": _line("list_response.jsonl", "1: response is a list of chat messages but prompt is a string"),
    "response of a user": _line("user_response.jsonl", "1: response has a message of role 'user'"),
    "many": _line("many.jsonl", "20", "problems (30)", "... and 10 more"),
    "latin": _line("latin.jsonl", "1", "want UTF-8"),
    "utf-16": _line("wide.jsonl", "1", "want UTF-8"),
    "gzip": _line("cut.jsonl.gz", "", "gzip"),
    "not gzip": _line("plain.jsonl.gz", "1", "gzip"),
    "unnamed gzip": _line("packed.jsonl", "1"),
    "parquet": _line("broken.parquet", "", "corrupt"),
    "cut parquet": _line("cut.parquet", "", "corrupt"),
    "columns": _line("columns.parquet", " has none of the columns prompt"),
    "null": _line("rows.parquet", "row 2: response is null"),
    "no rows": _line("no_rows.parquet", " holds no row"),
    "validation": files(f"{VALIDATION}=[label.jsonl]", says=("label.jsonl:2",)),
    "too few": files(f"{TRAIN}=[two.jsonl]", says=("2 rows, fewer than model.global_batch_size=4",)),
    "all too long": files(f"{TRAIN}=[long.jsonl]", says=("all 9 records of long.jsonl", "model.data.seq_length=64")),
    "overlong": files(f"{TRAIN}=[long.jsonl]", "model.data.overlong=error", says=("long.jsonl:1", "64")),
    "locked": pytest.param(_line("locked.jsonl", " cannot be read"), marks=locked),
}

MODELS = {
    "no model there": _model("nothing", "nothing is no model directory", "config.json"),
    "no hf side": _model("megatron", "megatron is a Megatron checkpoint without hf/config.json"),
    "config.json": _model("garbled", "garbled/config.json: not valid JSON"),
    "list for config": _model("listed", "listed/config.json: holds list, not an object"),
    "no layers": _model("no_layers", "no_layers/config.json: num_hidden_layers: expected a positive integer, found 0"),
    "no vocabulary": _model("no_vocabulary", "no_vocabulary/config.json: vocab_size"),
    "architecture": _model("bert", "bert/config.json: model_type", "LlamaForCausalLM"),
    "experts": _model("moe", "moe/config.json: num_local_experts"),
    "quantized": _model("quantized", "quantized/config.json: quantization_config"),
    "rope": _model("yarn", "yarn/config.json: rope_parameters.rope_type: 'yarn'", "llama3"),
    "no tokenizer": _model("no_tokenizer", "tokenizer", "want tokenizer.json"),
    "garbled tokenizer": _model("garbled_tokenizer", "holds no usable tokenizer", "want tokenizer.json"),
    "empty tokenizer": _model("empty_tokenizer", "holds no usable tokenizer", "want tokenizer.json"),
    "tokenizer with code": _model("own_code", "holds no usable tokenizer", "no tokenizer that needs code of its own"),
    "no eos": _model("no_eos", "has no EOS token", "model.data.append_eos=false"),
    "no template": files(
        *(f"{MODEL}=no_template", f"{TRAIN}=[talk.jsonl]"),
        says=("talk.jsonl:1: holds chat messages", "want plain text"),
    ),
    "template": files(
        *(f"{MODEL}=strict_template", f"{TRAIN}=[talk.jsonl]"),
        says=("talk.jsonl:1", "roles must alternate", "want roles"),
    ),
    "vocabulary": _model("small_vocabulary", "good.jsonl:1", "below 300 (vocab_size of its config.json)"),
}

PLACES = {
    "output under a file": config(f"{OUT}=a_file/out", says=(f"{OUT}=a_file/out", "cannot be written")),
    "output is a file": config(f"{OUT}=a_file", says=(f"{OUT}=a_file is a file", "name a directory")),
    "output read-only": config(f"{OUT}=/proc/nemo_kto", says=(f"{OUT}=/proc/nemo_kto", "cannot be written")),
    "checkpoints is a file": config(f"{OUT}=taken", says=(f"{OUT}=taken", "taken/checkpoints is a file")),
    "metrics is a folder": config(f"{OUT}=taken_too", says=(f"{OUT}=taken_too", "metrics.jsonl is a directory")),
    "home": files("model.data.cache_dir=null", says=("a_file/.cache", "model.data.cache_dir"), HOME="a_file"),
    "cache": files("model.data.cache_dir=a_file", says=("the token cache in a_file", "model.data.cache_dir")),
    "resume": files("exp_manager.resume_from_checkpoint=model", says=("exp_manager.resume_from_checkpoint=model",)),
    "resume nothing": config(
        "exp_manager.resume_from_checkpoint=gone", says=("resume_from_checkpoint=gone does not exist",)
    ),
    "nothing to resume": files(
        "exp_manager.resume_ignore_no_checkpoint=false",
        says=("out/checkpoints holds no checkpoint", "resume_ignore_no_checkpoint=true starts anew"),
    ),
    "earlier run": files(
        *("exp_manager.resume_if_exists=false", f"{OUT}=earlier"),
        says=("earlier/checkpoints/step-000007 is of an earlier run", f"another {OUT}"),
    ),
}

LAUNCHES = {
    "devices": config("trainer.devices=4", says=("trainer.devices=4", "launcher started 2"), RANK="0", WORLD_SIZE="2"),
    "launched nodes": config(
        "trainer.num_nodes=1",
        says=("trainer.num_nodes=1", "launcher started 2"),
        **{"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
    ),
    "rank": config(says=("rank 2, world size 2",), RANK="2", WORLD_SIZE="2"),
    "uneven": config(says=("world size 3, 2 per node",), **{"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}),
    "junk": config(says=("WORLD_SIZE='two'", "the launcher sets it"), RANK="0", WORLD_SIZE="two"),
    "slurm": config(
        f"{TP}=4",
        says=("world size 2 is not a multiple of",),
        **{"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_NNODES": "1"},
    ),
}

TRAINING = {**ASKED, **DATA, **MODELS, **PLACES, **LAUNCHES}
"""Told before Megatron is imported."""
