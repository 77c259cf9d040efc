"""What a path to a model is, told from its files alone."""

from __future__ import annotations

from pathlib import Path

from nemo_kto.errors import CheckpointError

HF_SUBDIR = "hf"
"""Sub-directory of a Megatron checkpoint with the config and tokenizer of the Hugging Face model it came from."""


def is_megatron_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a Megatron distributed checkpoint directory."""
    return (Path(path) / "metadata.json").is_file()


def hf_side(path: str | Path) -> Path:
    """The directory with config.json and tokenizer: ``path`` itself, or a Megatron checkpoint's ``hf/``.

    Raises:
        CheckpointError: ``path`` is neither kind of model directory.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory: give a Hugging Face or Megatron checkpoint directory")
    if is_megatron_checkpoint(folder):
        if not (folder / HF_SUBDIR / "config.json").is_file():
            raise CheckpointError(
                f"{folder} is a Megatron checkpoint without {HF_SUBDIR}/config.json: copy config.json and "
                f"tokenizer of its Hugging Face model into {folder / HF_SUBDIR}"
            )
        return folder / HF_SUBDIR
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is no model directory: it holds neither config.json (Hugging Face) nor metadata.json (Megatron)"
        )
    return folder
