"""What a checkpoint costs the training: written while it waits, and written beside it (``async_save``).

Trains the same random Llama both ways, in turns, and prints for each way how long the training stood still per
checkpoint, and how long a step took while a checkpoint was being written beside it, against the other steps of the
same runs. The last checkpoint of a run is left out: the run waits for it either way.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "demo"))
WAITED = re.compile(r"saved step-(\d+), training waited ([\d.]+) s")
STEPS, INTERVAL = 14, 4
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each way (default: 3)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="async_save_") as folder:
        print(f"{_make_material(Path(folder)) / 1e6:.1f} M parameters, {STEPS} steps, a checkpoint every {INTERVAL}")
        found: dict[str, dict[str, list[float]]] = {}
        for pair in range(args.pairs):
            for way in ("false", "true") if pair % 2 == 0 else ("true", "false"):
                for name, values in _run(Path(folder), way, pair).items():
                    found.setdefault(way, {}).setdefault(name, []).extend(values)
    rows = {
        "training waited, per checkpoint": ("waited", found["false"], found["true"]),
        "step after a checkpoint": ("after", found["false"], found["true"]),
        "other steps": ("other", found["false"], found["true"]),
    }
    print("\n| median (smallest to largest), seconds | async_save=false | async_save=true | ratio |")
    print("| --- | --- | --- | --: |")
    for title, (key, sync, beside) in rows.items():
        ratio = statistics.median(beside[key]) / statistics.median(sync[key])
        print(f"| {title} | {_spread(sync[key])} | {_spread(beside[key])} | {ratio:.2f} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def _make_material(folder: Path) -> int:
    import tiny
    from safetensors import safe_open

    tiny.make_model(folder / "model", **SIZES)
    tiny.make_records(folder / "train.jsonl", 200, seed=1)
    with safe_open(folder / "model" / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def _run(folder: Path, asynchronous: str, pair: int) -> dict[str, list[float]]:
    out = f"run_{asynchronous}_{pair}"
    callback = "exp_manager.checkpoint_callback_params"
    command = [
        *(sys.executable, "-m", "nemo_kto.cli.main", "train", "pretrained_checkpoint.restore_from_path=model"),
        *("model.data.data_prefix.train=[train.jsonl]", "model.data.cache_dir=cache", "model.data.seq_length=64"),
        *("model.global_batch_size=8", "model.micro_batch_size=4", "trainer.precision=32", "trainer.devices=1"),
        *(f"trainer.kto.max_steps={STEPS}", "trainer.kto.max_epochs=9", f"trainer.kto.save_interval={INTERVAL}"),
        *("model.optim.sched.name=Constant", "model.optim.sched.warmup_steps=2", "model.optim.lr=1e-4"),
        *(f"{callback}.async_save={asynchronous}", f"{callback}.save_last_k=1", f"exp_manager.explicit_log_dir={out}"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    waits = {int(step): float(seconds) for step, seconds in WAITED.findall(done.stderr)}
    waits.pop(STEPS, None)
    lines = [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]
    times = {line["step"]: line["step_time_s"] for line in lines if "step_time_s" in line}
    return {
        "waited": list(waits.values()),
        "after": [times[step + 1] for step in waits],
        "other": [seconds for step, seconds in times.items() if step > 1 and step - 1 not in waits],
    }


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
