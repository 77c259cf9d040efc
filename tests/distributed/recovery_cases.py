"""What the ranks of test_recovery.py do: one function per promise, which returns what it found."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist
import training_kit as kit
from training_kit import Run, Setup

STEPS = (1, 2, 3)


def _on_one(action: Callable[[], object]) -> None:
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def _error(action: Callable[[], object]) -> tuple[str, str]:
    try:
        action()
    except Exception as error:  # its type is what the test looks at
        return type(error).__name__, str(error)
    return "", ""


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _shard(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped bit": lambda folder: _flip(_shard(folder)),
    "cut shard": lambda folder: _shard(folder).write_bytes(_shard(folder).read_bytes()[:-100]),
    "lost shard": lambda folder: sorted(folder.glob("*.distcp"))[-1].unlink(),
    "lost index": lambda folder: (folder / ".metadata").unlink(),
    "lost format": lambda folder: (folder / "metadata.json").unlink(),
    "lost manifest": lambda folder: (folder / "manifest.json").unlink(),
    "garbled manifest": lambda folder: (folder / "manifest.json").write_text("{"),
    "garbled streams": lambda folder: _flip(folder / "random.safetensors"),
    "emptied": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


def saved(rank: int, root: Path) -> bool:
    """The run that the other cases damage copies of."""
    run = Run(Setup(tp=2), root / "model")
    for step in STEPS:
        run.train(1)
        run.save(root / "run" / "checkpoints" / f"step-{step:06d}")
    return all((root / "run" / "checkpoints" / f"step-{step:06d}").is_dir() for step in STEPS)


def damaged(rank: int, root: Path) -> dict[str, tuple[str, list[str]]]:
    """Which checkpoint is taken, and what is there afterwards."""
    from nemo_kto.checkpoint.recovery import whole_checkpoint

    found = {}
    for name, harm in DAMAGE.items():
        log_dir = root / f"damaged-{name.replace(' ', '-')}"
        newest = log_dir / "checkpoints" / f"step-{STEPS[-1]:06d}"
        _on_one(partial(shutil.copytree, root / "run", log_dir))
        _on_one(partial(harm, newest))
        taken = whole_checkpoint(newest, log_dir)
        found[name] = (taken.name, sorted(path.name for path in newest.parent.iterdir()))
    return found


def hopeless(rank: int, root: Path) -> dict[str, object]:
    """All are damaged; and one that was asked for by name is."""
    from nemo_kto.checkpoint.recovery import whole_checkpoint

    log_dir = root / "hopeless"
    folders = [log_dir / "checkpoints" / f"step-{step:06d}" for step in STEPS]
    _on_one(lambda: [shutil.copytree(root / "run", log_dir), *[_flip(_shard(folder)) for folder in folders]])
    kind, text = _error(lambda: whole_checkpoint(folders[-1], log_dir))
    named = _error(lambda: whole_checkpoint(folders[-1], root / "another"))
    return {"all": (kind, text), "named": named, "left": sorted(path.name for path in folders[0].parent.iterdir())}


def twice_damaged(rank: int, root: Path) -> list[str]:
    """The same step is damaged again after it was written again."""
    from nemo_kto.checkpoint.recovery import whole_checkpoint

    log_dir = root / "twice"
    newest = log_dir / "checkpoints" / f"step-{STEPS[-1]:06d}"
    _on_one(lambda: shutil.copytree(root / "run", log_dir))
    for _ in range(2):
        _on_one(lambda: _flip(_shard(newest)))
        whole_checkpoint(newest, log_dir)
        _on_one(lambda: shutil.copytree(root / "run" / "checkpoints" / newest.name, newest))
    return sorted(path.name for path in newest.parent.iterdir())


def written_beside(rank: int, root: Path) -> dict[str, object]:
    """An asynchronous save holds the weights of its moment, whatever the training does meanwhile."""
    from nemo_kto.checkpoint.saving import CheckpointWriter

    run = Run(Setup(tp=2, optimizer="distributed_fused_adam"), root / "model")
    run.train(1)
    CheckpointWriter().save(run.chunks, run.contents(), root / "sync", run.groups)
    writer = CheckpointWriter(asynchronous=True)
    writer.save(run.chunks, run.contents(), root / "async", run.groups)
    begun = (writer.is_writing, (root / "async").exists())
    run.train(2)
    published = writer.finish()
    dist.barrier()
    return {
        "begun": begun,
        "published": published == root / "async" and not writer.is_writing,
        "again": writer.finish(),
        "equal": _bytes_of(root / "sync") == _bytes_of(root / "async"),
        "left": sorted(path.name for path in root.glob("async*")),
    }


def _bytes_of(folder: Path) -> dict[str, object]:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: record for name, record in files.items() if name.endswith((".distcp", ".pt", ".safetensors"))}


def refused(rank: int, root: Path) -> dict[str, object]:
    """Rank 1 alone cannot write its shards; rank 0 alone cannot write the index. Then both can."""
    from nemo_kto.checkpoint import saving

    run = Run(Setup(tp=2), root / "model")
    small = saving._write_small
    found: dict[str, object] = {}
    for name, asynchronous in (("sync", False), ("async", True)):
        writer = saving.CheckpointWriter(asynchronous=asynchronous)

        def write(out: str, writer=writer) -> tuple[str, str]:
            return _error(lambda: [writer.save(run.chunks, run.contents(), root / out, run.groups), writer.finish()])

        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
        found[f"{name} shard"] = write(f"no-shard-{name}")
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        saving._write_small = partial(_in_the_way, small)
        found[f"{name} index"] = write(f"no-index-{name}")
        saving._write_small = small
        found[f"{name} then"] = write(f"fine-{name}")
    dist.barrier()
    return {**found, "left": sorted(path.name for pattern in ("no-*", "fine-*") for path in root.glob(pattern))}


def _in_the_way(write: Callable[..., None], draft: Path, *rest: object) -> None:
    """A directory where the index belongs, which only rank 0 writes."""
    write(draft, *rest)
    (draft / ".metadata").mkdir()


def reference(rank: int, root: Path) -> dict[str, object]:
    """A run keeps its reference; a resumed run takes that one, or says why it cannot."""
    from nemo_kto.checkpoint.run_reference import RunReference
    from nemo_kto.checkpoint.saving import Contents
    from nemo_kto.checkpoint.weights import load_weights
    from nemo_kto.config import manifest

    run = Run(Setup(tp=2), root / "other", reference=root / "model")
    log_dir = root / "kept"
    checkpoint = log_dir / "checkpoints" / "step-000001"
    expected = {name: value.clone() for name, value in Run(Setup(tp=2), root / "model").weights().items()}

    def settle(source: str, *, resume: bool, may_differ: bool = False, where: Path = log_dir) -> object:
        key = f"model.kto.reference_from_path={root / source}"
        load = partial(load_weights, run.chunks, run.arch, root / source, run.groups)
        settled = RunReference(where, key, load, Contents(root / "model")).settle(
            run.chunks,
            run.groups,
            resume_from=checkpoint if resume else None,
            may_differ=may_differ,
            keep=True,
        )
        return settled.identity, kit.same(run.weights(), expected)

    fresh = settle("model", resume=False)
    record = json.dumps({"reference": fresh[0], "identity": {}})
    _on_one(lambda: [checkpoint.mkdir(parents=True), (checkpoint / "run.json").write_text(record)])
    _on_one(lambda: manifest.complete(checkpoint, {}))
    found: dict[str, object] = {"fresh": fresh, "resumed": settle("other", resume=True)}
    found["elsewhere"] = settle("other", resume=True, where=root / "branch")[1], (root / "branch/reference").is_dir()
    _on_one(lambda: _flip(_shard(log_dir / "reference")))
    found["damaged"] = _error(lambda: settle("model", resume=True))
    _on_one(lambda: shutil.rmtree(log_dir / "reference"))
    found["lost"] = _error(lambda: settle("model", resume=True))
    found["replaced"] = settle("other", resume=True, may_differ=True)[1]
    found["another"] = _error(lambda: settle("model", resume=True))
    return found
