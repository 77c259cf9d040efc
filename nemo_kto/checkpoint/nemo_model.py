"""A ``.nemo`` archive as a model directory that everything else reads.

Distributed weights become a Megatron checkpoint with ``hf/`` beside, torch files a Hugging Face directory.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from nemo_kto.checkpoint import nemo_config
from nemo_kto.checkpoint.hf_export import copy_companions
from nemo_kto.checkpoint.nemo_tokenizer import settle_tokenizer
from nemo_kto.checkpoint.nemo_weights import FILE, check_distributed, rank_files, to_safetensors
from nemo_kto.checkpoint.unpacking import Records, unpack
from nemo_kto.config.architecture import Architecture, read_architecture, to_hf_config
from nemo_kto.config.locate import HF_SUBDIR
from nemo_kto.config.manifest import MANIFEST
from nemo_kto.errors import CheckpointError

WEIGHTS = "model_weights"
"""Directory of an archive with a distributed checkpoint."""
_KIND = "nemo-model-1"  # the number rises whenever the same archive would become another directory
_MADE = ".made"
_LEFT = frozenset({HF_SUBDIR, MANIFEST})  # of a whole checkpoint in place of the bare weights


def model_directory(archive: str | Path, root: Path, tokenizer: Path | None = None) -> Path:
    """Unpack an archive once under ``root``, by whichever process comes first, and return its model directory.

    Args:
        archive: a ``.nemo`` file, ours or NeMo 1.x's of a Megatron-Core GPT.
        root: a directory for caches.
        tokenizer: Hugging Face directory whose tokenizer is used instead of the archive's. The cache does not tell
            one from another: give each its own ``root``.

    Raises:
        CheckpointError: the archive is damaged, unsafe or unsupported, or ``root`` has no room.
    """
    return unpack(archive, root, _KIND, partial(_settle, archive=Path(archive), tokenizer=tokenizer))


def _settle(folder: Path, records: Records, archive: Path, tokenizer: Path | None) -> Records:
    try:
        return _settled(folder, records, tokenizer)
    except CheckpointError as error:  # the reader knows the archive, not where it was unpacked
        raise CheckpointError(str(error).replace(str(folder), str(archive))) from error


def _settled(folder: Path, records: Records, tokenizer: Path | None) -> Records:
    values = nemo_config.read_yaml(folder / nemo_config.FILE)
    hf = folder / HF_SUBDIR
    own = (hf / "config.json").is_file()
    arch, tokens = (_own(values, folder, tokenizer), {}) if own else _foreign(values, folder, tokenizer)
    (folder / _MADE).mkdir()
    if (folder / WEIGHTS).is_dir():
        dtype = check_distributed(folder / WEIGHTS, arch)
    else:
        files = rank_files(folder)
        if not files:
            raise CheckpointError(
                f"{folder} holds neither {WEIGHTS}/ nor {FILE}: it is no archive of a language model"
            )
        dtype = to_safetensors(files, arch, folder / _MADE)
    if not own:
        config = {**to_hf_config(arch, dtype), **tokens}
        (hf / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _remove(folder, keep={HF_SUBDIR, _MADE, WEIGHTS})
    if (folder / WEIGHTS).is_dir():
        (folder / _MADE).rmdir()
        _raise_contents(folder / WEIGHTS, leave=_LEFT)
        return _below(WEIGHTS, records)
    _raise_contents(folder / _MADE)
    _raise_contents(hf)
    return {}


def _own(values: dict[str, Any], folder: Path, tokenizer: Path | None) -> Architecture:
    """The network of an archive that holds the Hugging Face config, which must say the same as the settings."""
    arch = read_architecture(folder / HF_SUBDIR)
    if nemo_config.to_architecture(values, arch.vocab_size, folder / nemo_config.FILE) != arch:
        raise CheckpointError(
            f"{folder}: {nemo_config.FILE} and {HF_SUBDIR}/config.json describe different networks: make them agree"
        )
    if tokenizer is not None:
        copy_companions(tokenizer, folder / HF_SUBDIR)
    return arch


def _foreign(values: dict[str, Any], folder: Path, given: Path | None) -> tuple[Architecture, dict[str, Any]]:
    """Network and special tokens of an archive of NeMo's; its tokenizer goes to ``hf/``."""
    where = folder / nemo_config.FILE
    nemo_config.to_architecture(values, 1, where)  # what is unsupported is said before the tokenizer is looked for
    (folder / HF_SUBDIR).mkdir(exist_ok=True)
    tokenizer = settle_tokenizer(values, folder, folder / HF_SUBDIR, given)
    vocab_size = values.get("override_vocab_size") or len(tokenizer)
    if not isinstance(vocab_size, int) or vocab_size < len(tokenizer):
        raise CheckpointError(
            f"{where}: override_vocab_size: {vocab_size!r} is no number from {len(tokenizer)}, the tokenizer's, up"
        )
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return nemo_config.to_architecture(values, vocab_size, where), {name: getattr(tokenizer, name) for name in ids}


def _below(place: str, records: Records) -> Records:
    """What is known of the files that came from directory ``place``, but for those that were left there."""
    inner = {
        name.removeprefix(f"{place}/"): record for name, record in records.items() if name.startswith(f"{place}/")
    }
    return {name: record for name, record in inner.items() if name.split("/")[0] not in _LEFT}


def _remove(folder: Path, keep: set[str]) -> None:
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _raise_contents(folder: Path, leave: frozenset[str] = frozenset()) -> None:
    """Put everything in ``folder`` one level higher, but for the names to leave, and remove it."""
    for path in list(folder.iterdir()):
        if path.name not in leave:
            path.rename(folder.parent / path.name)
    shutil.rmtree(folder)
