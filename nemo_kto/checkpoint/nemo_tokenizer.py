"""The tokenizer of a NeMo 1.x archive as a Hugging Face one. Needs no hub, and runs nothing of the archive's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nemo_kto.checkpoint.hf_export import copy_companions
from nemo_kto.data.encode import load_tokenizer
from nemo_kto.errors import CheckpointError

_ARTIFACT = "nemo:"
_ADVICE = "run `nemo-kto convert from-nemo --tokenizer DIR` with a Hugging Face directory that holds the tokenizer"
_PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  two  spaces, a\ttab",
    "Zwölf Boxkämpfer, 日本語, 🙂",
    "def f(x):\n    return x ** 2\n",
)
"""Texts that tell normalisers, prefix spaces and byte fallbacks apart."""


def settle_tokenizer(values: dict[str, Any], archive: Path, out: Path, given: Path | None) -> Any:
    """Write the tokenizer of an unpacked archive to ``out``.

    Args:
        values: the archive's settings.
        archive: the unpacked archive.
        out: directory for the tokenizer's files.
        given: Hugging Face directory whose tokenizer is used instead.

    Returns:
        The tokenizer, loaded.

    Raises:
        CheckpointError: the archive holds none that can be used.
    """
    if given is not None:
        load_tokenizer(given)
        copy_companions(given, out)
    else:
        _from_archive(values, archive, out)
    return load_tokenizer(out)


def _from_archive(values: dict[str, Any], archive: Path, out: Path) -> None:
    section = values.get("tokenizer")
    section = section if isinstance(section, dict) else {}
    library, model = section.get("library"), section.get("model") or section.get("tokenizer_model")
    if library == "sentencepiece" and model:
        _sentencepiece(_artifact("tokenizer.model", model, archive), out)
    elif section.get("vocab_file") and section.get("merge_file"):
        shutil.copyfile(_artifact("tokenizer.vocab_file", section["vocab_file"], archive), out / "vocab.json")
        shutil.copyfile(_artifact("tokenizer.merge_file", section["merge_file"], archive), out / "merges.txt")
        end = "<|endoftext|>"
        _write(out, {"tokenizer_class": "GPT2Tokenizer", "bos_token": None, "eos_token": end, "unk_token": end})
    elif str(model or section.get("type")).endswith("tokenizer.json"):
        source = model or section.get("type")
        shutil.copyfile(_artifact("tokenizer.model", source, archive), out / "tokenizer.json")
        _write(out, {"tokenizer_class": "PreTrainedTokenizerFast", **_special_tokens(section)})
    else:
        named = section.get("type") or model
        raise CheckpointError(f"{archive}: its tokenizer is {library!r} {named!r}, which is not in it: {_ADVICE}")


def _artifact(key: str, reference: Any, archive: Path) -> Path:
    """The file that ``nemo:NAME`` stands for: NeMo keeps artifacts at the top of the archive."""
    found = archive / Path(str(reference).removeprefix(_ARTIFACT)).name
    if not found.is_file():
        raise CheckpointError(f"{archive}: {key}={reference} is not in the archive: {_ADVICE}")
    return found


def _sentencepiece(model: Path, out: Path) -> None:
    """A sentencepiece model as transformers' Llama tokenizer, if that one agrees with it.

    It begins a text with BOS where the model has one, as that of the Hugging Face model would.
    """
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.Load(str(model))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{model} is no sentencepiece model: {error}") from None
    special = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    tokens = {name: pieces.IdToPiece(number) for name, number in special.items() if number >= 0}
    add_bos = "bos_token" in tokens
    _convert(model, {**tokens, "add_bos_token": add_bos, "add_eos_token": False}, out)
    _write(out, {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens})
    tokenizer = load_tokenizer(out)
    for text in _PROBES:
        expected = [pieces.bos_id()] * add_bos + pieces.EncodeAsIds(text)
        if tokenizer(text)["input_ids"] != expected or len(tokenizer) != pieces.GetPieceSize():
            raise CheckpointError(
                f"{model}: transformers reads this model otherwise than sentencepiece does ({text!r}): {_ADVICE}"
            )


def _convert(model: Path, settings: dict[str, Any], out: Path) -> None:
    """Write ``tokenizer.json`` for a sentencepiece model of Llama's kind."""
    from tokenizers import normalizers

    shutil.copyfile(model, out / "tokenizer.model")
    _write(out, {"tokenizer_class": "LlamaTokenizer", **settings})
    backend = load_tokenizer(out).backend_tokenizer
    # transformers drops the prefix space of a text that begins with a space; sentencepiece does not
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    (out / "tokenizer.model").unlink()
    backend.save(str(out / "tokenizer.json"))


def _special_tokens(section: dict[str, Any]) -> dict[str, Any]:
    given = section.get("special_tokens")
    return {key: value for key, value in given.items() if isinstance(value, str)} if isinstance(given, dict) else {}


def _write(out: Path, config: dict[str, Any]) -> None:
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
