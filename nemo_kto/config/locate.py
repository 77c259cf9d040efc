"""What a path to a model is, told from its files alone."""

from __future__ import annotations

from pathlib import Path

from nemo_kto.config.schema import ExpManagerConfig
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


def checkpoint_steps(log_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of the checkpoints of a run, oldest first. They got their names when they were whole."""
    found = [(_step_of(path), path) for path in (log_dir / "checkpoints").glob("step-*") if path.is_dir()]
    return sorted((step, path) for step, path in found if step is not None)


def newest_checkpoint(log_dir: Path) -> Path | None:
    """The checkpoint of the latest step, if there is one."""
    steps = checkpoint_steps(log_dir)
    return steps[-1][1] if steps else None


def resume_path(exp: ExpManagerConfig) -> Path | None:
    """The checkpoint that a run goes on from; None where it starts anew.

    Raises:
        CheckpointError: there is none although one is asked for, or one that a new run would be mixed up with.
    """
    log_dir = Path(exp.explicit_log_dir)
    newest = newest_checkpoint(log_dir)
    if exp.resume_from_checkpoint is not None:
        if not is_megatron_checkpoint(exp.resume_from_checkpoint):
            raise CheckpointError(
                f"exp_manager.resume_from_checkpoint={exp.resume_from_checkpoint} holds no metadata.json"
            )
        asked = Path(exp.resume_from_checkpoint)
        if newest is not None and asked.resolve() != newest.resolve():
            raise CheckpointError(
                f"exp_manager.resume_from_checkpoint={asked}, but {newest} is of a run in this directory already: "
                "choose another exp_manager.explicit_log_dir"
            )
        return asked
    if not exp.resume_if_exists and newest is not None:
        raise CheckpointError(
            f"{newest} is of an earlier run: choose another exp_manager.explicit_log_dir, or set "
            "exp_manager.resume_if_exists=true to go on from there"
        )
    if newest is None and exp.resume_if_exists and not exp.resume_ignore_no_checkpoint:
        raise CheckpointError(
            f"{log_dir}/checkpoints holds no checkpoint to resume from; "
            "exp_manager.resume_ignore_no_checkpoint=true starts anew"
        )
    return newest


def _step_of(path: Path) -> int | None:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else None
