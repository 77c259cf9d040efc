"""What the ranks of test_checkpoint.py do: one function per promise, which returns what it found."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import psutil
import torch
import training_kit as kit
from training_kit import Run, Setup

SAME_LAYOUT = {
    "fp32": Setup(),
    "dropout": Setup(dropout=0.1),
    "fp32 sharded": Setup(optimizer="distributed_fused_adam"),
    "sgd momentum": Setup(optimizer="sgd", lr=0.1),
    "sgd": Setup(optimizer="sgd", lr=0.1, momentum=0.0),
    "bf16": Setup(bf16=True),
    "bf16 sharded": Setup(optimizer="distributed_fused_adam", bf16=True),
}
SAME_LAYOUT_TWO = {
    "dp2 fp32 sharded": Setup(optimizer="distributed_fused_adam"),
    "dp2 bf16 sharded": Setup(optimizer="distributed_fused_adam", bf16=True),
    "dp2 overlapped": Setup(optimizer="distributed_fused_adam", overlap=True),
    "tp2": Setup(tp=2),
    "tp2 dropout": Setup(tp=2, dropout=0.1),
    "pp2 dropout": Setup(pp=2, dropout=0.1),
    "pp2": Setup(pp=2, optimizer="distributed_fused_adam"),
}
OPTIMIZERS = {"tied": "distributed_fused_adam", "untied": "adamw"}
RELAY = {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "dp2": {}}
"""Each layout takes over what the one before it saved, and trains :data:`LEG` steps."""
LEG = 2
MOMENTS = ("writing", "publishing")


def _folder(root: Path, name: str) -> Path:
    return root / name.replace(" ", "-")


def resumed(root: Path, name: str, setup: Setup) -> dict[str, object]:
    """Save after 2 steps and train 3 more; a run that started elsewhere loads and must do the same 3."""
    policy, other = root / "tied", root / "other"
    run = Run(setup, policy)
    run.train(2)
    run.save(_folder(root, name))
    weights, state = run.weights(), run.optimizer_state()
    expected = run.train(3)
    fresh = Run(setup, other, policy).load(_folder(root, name))
    loaded = {
        "weights loaded": kit.same(fresh.weights(), weights),
        "optimizer loaded": kit.same(fresh.optimizer_state(), state),
        "steps": fresh.steps_done,
    }
    found = fresh.train(3)
    return {
        **loaded,
        "records": (found, expected),
        "weights": kit.same(fresh.weights(), run.weights()),
        "optimizer": kit.same(fresh.optimizer_state(), run.optimizer_state()),
        "rounded masters": [torch.equal(master, master.bfloat16().float()) for master, _ in state if master.dim() > 1],
    }


def resharding(rank: int, root: Path) -> dict[str, list[dict[str, float]]]:
    """The relay on two ranks, for the tied and the untied model."""
    records: dict[str, list[dict[str, float]]] = {}
    for model in ("tied", "untied"):
        before: Path | None = None
        records[model] = []
        for name, sizes in RELAY.items():
            run = Run(Setup(optimizer=OPTIMIZERS[model], **sizes), root / model)
            if before is not None:
                run.load(before)
            records[model] += run.train(LEG)
            before = root / f"relay-{model}-{name}"
            run.save(before)
    return records


def relay_end(rank: int, root: Path) -> dict[str, tuple[list[dict[str, float]], list[dict[str, float]]]]:
    """One rank takes the last baton; and the same number of steps without interruption."""
    setups = {model: Setup(optimizer=name) for model, name in OPTIMIZERS.items()}
    return {
        model: (
            Run(setup, root / model).load(root / f"relay-{model}-dp2").train(LEG),
            Run(setup, root / model).train(LEG * (len(RELAY) + 1)),
        )
        for model, setup in setups.items()
    }


def torch_adam(rank: int, root: Path) -> dict[str, object]:
    """Megatron 0.16's mistakes with torch's Adam, each where it would show."""
    from nemo_kto.training.optim import prime_state

    found: dict[str, object] = {}
    for name in ("fp32", "fp32 sharded", "bf16 sharded"):
        run = Run(SAME_LAYOUT[name], root / "tied")
        weights, rates = run.weights(), _rates(run)
        prime_state(run.optimizer.megatron)
        found[name] = {
            "weights kept": kit.same(weights, run.weights()),
            "rates kept": rates == _rates(run),
            "moments": {float(state["exp_avg"].abs().max()) for _, state in run.optimizer_state()},
        }
        run.load(_folder(root, name))
        steps = [state["step"] for state in run.optimizer.megatron.chained_optimizers[0].optimizer.state.values()]
        found[name]["shared"] = len(steps) - len({step.data_ptr() for step in steps})
        found[name]["loaded"] = {float(step) for step in steps}
        run.train(1)
        found[name]["after one more"] = {float(state["step"]) for _, state in run.optimizer_state()}
    return found


def _rates(run: Run) -> list[tuple[float, float]]:
    return [(group["lr"], group["weight_decay"]) for group in run.optimizer.param_groups]


def weights_only(rank: int, root: Path) -> dict[str, object]:
    """Weights without an optimizer: saved alone, or read out of a whole checkpoint, at another layout."""
    from nemo_kto.checkpoint import dist
    from nemo_kto.errors import CheckpointError

    run = Run(Setup(tp=2, optimizer="distributed_fused_adam"), root / "tied")
    run.train(1)
    run.save(root / "alone", optimizer=False)
    run.save(root / "whole")
    expected = run.weights()
    found: dict[str, object] = {}
    for name in ("alone", "whole"):
        fresh = Run(Setup(tp=2), root / "other")
        dist.load_model(fresh.chunks, root / name, fresh.groups)
        found[name] = kit.same(fresh.weights(), expected)
    pipeline = Run(Setup(pp=2), root / "other")
    dist.load_model(pipeline.chunks, root / "alone", pipeline.groups)
    pipeline.save(root / "again", optimizer=False)
    back = Run(Setup(tp=2), root / "other")
    dist.load_model(back.chunks, root / "again", back.groups)
    found["through a pipeline"] = kit.same(back.weights(), expected)
    try:
        back.load(root / "alone")
    except CheckpointError as error:
        found["no optimizer"] = str(error)
    return found


def _broken(root: Path) -> dict[str, Path]:
    """Copies of a good checkpoint, each with one thing wrong. Made by one rank."""
    good, made = root / "whole", {name: root / f"broken-{name}" for name in BROKEN}
    if torch.distributed.get_rank() == 0:
        (made["empty"]).mkdir()
        for name in BROKEN:
            if name not in ("empty", "absent"):
                shutil.copytree(good, made[name])
        files = sorted(made["lost shard"].glob("*.distcp"))
        files[0].unlink()
        sorted(made["lost last shard"].glob("*.distcp"))[-1].unlink()
        cut = max(made["cut shard"].glob("*.distcp"), key=lambda file: file.stat().st_size)
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
        (made["garbled index"] / ".metadata").write_bytes(b"not a pickle")
        (made["lost index"] / ".metadata").unlink()
        (made["garbled format"] / "metadata.json").write_text("{")
        (made["unknown format"] / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr9"}))
        (made["lost common state"] / "common.pt").unlink()
    torch.distributed.barrier()
    return made


BROKEN = (
    "absent",
    "empty",
    "lost shard",
    "lost last shard",
    "cut shard",
    "garbled index",
    "lost index",
    "garbled format",
    "unknown format",
    "lost common state",
)


def _error(action) -> tuple[str, str]:
    try:
        action()
    except Exception as error:  # its type is what the test looks at
        return type(error).__name__, str(error)
    return "", ""


def loading_errors(rank: int, root: Path) -> dict[str, tuple[str, str]]:
    found = {}
    for name, folder in _broken(root).items():
        run = Run(Setup(optimizer="distributed_fused_adam"), root / "tied")
        found[name] = _error(lambda run=run, folder=folder: run.load(folder))
    for name in ("deeper", "wider", "qwen2"):
        run = Run(Setup(optimizer="distributed_fused_adam"), root / name)
        found[name] = _error(lambda run=run: run.load(root / "whole"))
    run = Run(Setup(tp=2), root / "tied")
    found["other optimizer"] = _error(lambda: run.load(root / "whole"))
    return found


def saving_errors(rank: int, root: Path) -> dict[str, tuple[str, str]]:
    run = Run(Setup(optimizer="distributed_fused_adam"), root / "tied")
    run.train(1)
    weights, file = run.weights(), root / "a-file"
    if rank == 0:
        file.touch()
    torch.distributed.barrier()
    found = {
        "exists": _error(lambda: run.save(root / "whole")),
        "under a file": _error(lambda: run.save(file / "step-1")),
    }
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))  # bytes per file, which stands for a full disk
    found["full disk"] = _error(lambda: run.save(root / "too-large"))
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    run.hf_dir = root / "nowhere"
    found["no config"] = _error(lambda: run.save(root / "without-config"))
    assert not any((root / name).exists() for name in ("too-large", "without-config"))
    assert kit.same(weights, run.weights())
    return found


def killed_save(rank: int, root: Path, moment: str) -> None:
    """Save twice; the second time this process is killed at the given moment."""
    from nemo_kto.checkpoint import saving
    from nemo_kto.config import manifest

    run = Run(Setup(), root / "tied")
    run.train(1)
    run.save(root / "killed" / moment / "step-000001")
    run.train(1)

    def die(*_: object) -> None:
        for child in psutil.Process().children(recursive=True):
            child.kill()  # Megatron's writers, which would outlive the test
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "writing":
        manifest.settle = die
    else:
        saving._publish = die
    run.save(root / "killed" / moment / "step-000002")


def saved_again(rank: int, root: Path) -> list[int]:
    """What a killed save left behind does not stand in the way of the next one."""
    steps = []
    for folder in (root / "killed" / moment for moment in MOMENTS):
        run = Run(Setup(), root / "tied").load(folder / "step-000001")
        run.train(1)
        run.save(folder / "step-000002")
        steps.append(Run(Setup(), root / "tied").load(folder / "step-000002").steps_done)
    return steps
