"""The table of bad inputs, for the other verbs, and of weights."""

from __future__ import annotations

from bad_cases import Bad, config, files

SCORE = ("score", "--model", "model", "--data", "good.jsonl", "--out", "nowhere/scores.jsonl", "--cache-dir", "cache")
PREPARE = ("prepare", "--data", "good.jsonl", "--tokenizer", "model")
TO_MEGATRON = ("convert", "hf-to-megatron", "--input", "model", "--output", "out/megatron")
VERBS = {
    "score: output": config(*SCORE, says=("--out nowhere/scores.jsonl: the directory", "does not exist")),
    "score: folder": config(*SCORE, "--out", "nothing", says=("--out nothing is a directory",)),
    "score: rows": config(*SCORE, "--micro-batch-size", "0", says=("--micro-batch-size 0 must be at least 1",)),
    "score: beta": config(*SCORE, "--beta", "0", says=("--beta 0.0 must be above 0",)),
    "score: no number": config(*SCORE, "--beta", "much", says=("argument --beta", "'much'")),
    "score: length": config(
        *SCORE, "--out", "s.jsonl", "--seq-length", "999", says=("999", "max_position_embeddings")
    ),
    "score: heads": config(*SCORE, "--out", "s.jsonl", "--tensor-parallel", "3", says=("4 attention heads % 3 = 1",)),
    "score: reference": files(
        *SCORE, "--out", "s.jsonl", "--reference", "deeper", says=("--reference deeper differ",)
    ),
    "score: model": files(*SCORE, "--out", "s.jsonl", "--model", "gone", says=("gone is not a directory",)),
    "score: data": files(*SCORE, "--out", "s.jsonl", "--data", "label.jsonl", says=("label.jsonl:2",)),
    "score: overlong": files(*SCORE, "--out", "s.jsonl", "--seq-length", "8", says=("good.jsonl:1", "8")),
    "score: vocabulary": files(
        *SCORE, "--out", "s.jsonl", "--model", "small_vocabulary", says=("good.jsonl:1", "300")
    ),
    "prepare: name": config(*PREPARE, "--out", "clean.txt", says=("--out clean.txt must end in .jsonl",)),
    "prepare: same": config(*PREPARE, "--out", "good.jsonl", says=("--out good.jsonl is one of the files of --data",)),
    "prepare: output": config(*PREPARE, "--out", "nowhere/a.jsonl", says=("--out nowhere/a.jsonl: its directory",)),
    "prepare: overlong": config(*PREPARE, "--overlong", "drop", says=("give --seq-length too",)),
    "prepare: length": config(*PREPARE, "--seq-length", "1", says=("--seq-length 1 leaves no room", "at least 2")),
    "prepare: choice": config(*PREPARE, "--overlong", "cut", says=("argument --overlong", "'cut'", "truncate")),
    "prepare: data": files("prepare", "--data", "rating.jsonl", "--tokenizer", "model", says=("rating.jsonl:2",)),
    "prepare: tokenizer": files(
        "prepare", "--data", "good.jsonl", "--tokenizer", "gone", says=("gone is not a directory",)
    ),
    "convert: direction": config("convert", says=("DIRECTION",)),
    "convert: heads": config(*TO_MEGATRON, "--tensor-parallel", "3", says=("4 attention heads % 3 = 1",)),
    "convert: input": files(
        *TO_MEGATRON, "--input", "gone", says=("gone/config.json: not found", "Give a Hugging Face")
    ),
    "convert: output": files(
        *TO_MEGATRON, "--output", "nothing", says=("nothing exists: remove it or choose another",)
    ),
    "convert: kind": files(
        *("convert", "megatron-to-hf", "--input", "model", "--output", "out/hf"),
        says=("model is not a Megatron checkpoint", "metadata.json"),
    ),
    "no verb": config("score", "--modle", "x", says=("required: --model",)),
}


def _score(model: str, *says: str) -> Bad:
    return files(*SCORE, "--out", "s.jsonl", "--model", model, says=(model, *says))


WEIGHTS = {
    "no weights": _score("no_weights", "neither model.safetensors nor", "give a Hugging Face directory"),
    "pickled": _score("pickled", "pytorch_model.bin is a pickle", "convert the model to safetensors"),
    "cut weights": _score("cut_weights", "model.safetensors: truncated or corrupt", "copy or download it again"),
    "pointer": _score("text_weights", "model.safetensors: truncated or corrupt", "copy or download it again"),
    "shape": _score("turned", "model.layers.0.mlp.up_proj.weight is [64, 128]", "config.json says [128, 64]"),
    "missing tensor": _score("lacking", "model.layers.0.mlp.up_proj.weight is missing from the weights"),
    "extra tensor": _score("extra", "model.extra is unexpected"),
    "missing shard": _score("no_shard", "part1.safetensors: missing", "copy the whole model directory"),
    "lost name": _score("lost_name", "part0.safetensors: model.more is missing"),
    "outside": _score("outside", "'../model/model.safetensors' is not a file name in this directory"),
    "garbled index": _score("garbled_index", "not a safetensors index"),
    "weights of another size": files(*TO_MEGATRON, "--input", "deeper", says=("deeper", "missing from the weights")),
}
"""Told by the process that loads them."""

FREE, TAKEN = "{free}", "{taken}"
"""Stand for a port that nobody uses, and for one that the test listens at."""


def _join(rank: str, address: str, port: str, *says: str) -> Bad:
    """One rank of two, with a meeting point."""
    return config(
        "trainer.join_timeout_minutes=0.05",
        says=says,
        **{"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": port},
    )


ALONE = {
    "score: world": config(
        *SCORE, "--out", "s.jsonl", "--tensor-parallel", "2", says=("world size 1 is not a multiple of",)
    ),
    "accelerator": config(
        "trainer.accelerator=gpu", says=("trainer.accelerator=gpu", "sees no CUDA device: use auto")
    ),
    "no meeting point": config(says=("MASTER_ADDR", "torchrun"), RANK="0", WORLD_SIZE="2"),
    "no port": _join("0", "127.0.0.1", "http", "MASTER_PORT='http'"),
    "missing rank": _join("0", "127.0.0.1", FREE, "rank 1 of 2 did not join within 3 s"),
    "port in use": _join("0", "127.0.0.1", TAKEN, "MASTER_PORT={taken} is in use", "set MASTER_PORT to a free port"),
    "no rank 0": _join("1", "127.0.0.1", FREE, "did not listen at MASTER_ADDR=127.0.0.1", "rank 0"),
    "no such host": _join("1", "nowhere.invalid", FREE, "MASTER_ADDR=nowhere.invalid"),
}
"""Told once the process would join others."""
