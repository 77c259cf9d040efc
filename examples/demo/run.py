"""The demo: train a small model with KTO, score it, sample from it, export it, and show before and after.

Run by ``make demo``. Every step is a command that is printed before it runs, so that it can be copied.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("demo_out")
# adapters start at zero and are few: they bear, and need, a higher rate than full fine-tuning
LORA = ("model.peft.peft_scheme=lora", "model.optim.lr=2e-4")
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Demo:
    """One demo: its config group, where its files go, how much is sampled, and how far one could go on."""

    config: str
    out: Path
    assets: Path
    train_file: str
    continuations: int
    further_steps: int
    lora: bool = False

    @property
    def run_dir(self) -> Path:
        """What training leaves behind."""
        return self.out / "run"

    @property
    def overrides(self) -> list[str]:
        """What ``nemo-kto train`` needs to know."""
        words = [f"demo={self.config}"]
        if self.out != self.assets.parent:
            words.append(f"exp_manager.explicit_log_dir={self.run_dir}")
        if self.train_file != "train.jsonl":
            words.append(f"model.data.data_prefix.train=[{self.assets / self.train_file}]")
        return [*words, *LORA] if self.lora else words

    @property
    def exported(self) -> Path:
        """The trained model as a Hugging Face directory."""
        return self.out / "model"


def shown(path: Path) -> str:
    """A path as the user would type it."""
    return os.path.relpath(path)


def command_line() -> str:
    """The installed ``nemo-kto``, as the user would type it."""
    return shown(Path(sysconfig.get_path("scripts")) / "nemo-kto")  # not always beside the interpreter


def step(title: str, *command: str) -> None:
    """Run one step; a failed one ends the demo with its exit code."""
    print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
    start = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)
    print(f"({time.monotonic() - start:.0f} s)", flush=True)


def script(name: str) -> tuple[str, str]:
    """The start of a command that runs a script of this folder."""
    return shown(Path(sys.executable)), shown(HERE / name)


def train(demo: Demo) -> None:
    """Train from the start, also where an earlier demo left a run that could be resumed."""
    for stale in (demo.run_dir, demo.exported):
        shutil.rmtree(stale, ignore_errors=True)
    step("train", command_line(), "train", *demo.overrides)


def measure(demo: Demo) -> None:
    """Export the trained model, score it on held-out records, sample from it, draw the curves."""
    before, heldout = demo.assets / "model", str(demo.assets / "heldout.jsonl")
    checkpoint = (demo.run_dir / "latest_checkpoint.txt").read_text(encoding="utf-8").strip()
    step(
        "export to a Hugging Face directory",
        *(command_line(), "convert", "megatron-to-hf", *(["--merge"] if demo.lora else [])),
        *("--input", checkpoint, "--output", str(demo.exported)),
    )
    step(
        "score the held-out records (before training the log-ratio is 0 by definition: margin 0, AUC 0.5)",
        *(command_line(), "score", "--model", str(demo.exported), "--reference", str(before), "--data", heldout),
        *("--out", str(demo.out / "scores.jsonl"), "--summary-json", str(demo.out / "scores.json")),
        *("--beta", "0.1", "--precision", "32", "--seq-length", "128", "--micro-batch-size", "8"),
    )
    step(
        "sample continuations of held-out prompts, before and after",
        *(*script("sentiment.py"), "--before", str(before), "--after", str(demo.exported), "--data", heldout),
        *("--count", str(demo.continuations), "--out", str(demo.out / "sentiment.json")),
    )
    step("draw the curves", command_line(), "report", "--metrics", str(demo.run_dir / "metrics.jsonl"))


def summarize(demo: Demo) -> None:
    """Print what changed, five continuations side by side, and where to go on."""
    scores = json.loads((demo.out / "scores.json").read_text(encoding="utf-8"))
    sentiment = json.loads((demo.out / "sentiment.json").read_text(encoding="utf-8"))
    num_records = scores["num_desirable"] + scores["num_undesirable"]
    before, after = sentiment["before"], sentiment["after"]
    print("\n== five continuations")
    for row in sentiment["rows"][:5]:
        print(f"\n{row['prompt']} ...\n  before: {one_line(row['before'])}\n  after:  {one_line(row['after'])}")
    margin_se = f"(standard error {scores['margin_se']:.3f})"
    vader_se = f"(standard errors {before['standard_error']:.3f} and {after['standard_error']:.3f})"
    print("\n== before and after")
    print(f"{'':42}  before   after")
    print(f"{f'reward margin, {num_records} held-out records':42}   0.000  {scores['margin']:+.3f}  {margin_se}")
    print(f"{'AUC of the log-ratio against the label':42}   0.500   {scores['auc']:.3f}")
    what = f"VADER sentiment, {sentiment['count']} continuations"
    print(f"{what:42}  {before['vader']:+.3f}  {after['vader']:+.3f}  {vader_se}")
    print(f"""
curves           {demo.run_dir / "curves.png"} (page: {demo.run_dir / "report.html"})
exported model   {demo.exported} (transformers.AutoModelForCausalLM.from_pretrained)
go on training   {command_line()} train {shlex.join(demo.overrides)} trainer.kto.max_steps={demo.further_steps}
your own data    {own_data(demo)}""")


def own_data(demo: Demo) -> str:
    """What to type to train in the same way on other records."""
    lines = [
        f"{command_line()} train pretrained_checkpoint.restore_from_path=MODEL",
        "'model.data.data_prefix.train=[train.jsonl]'",
        *([shlex.join(LORA)] if demo.lora else []),
    ]
    return f" \\\n{'':21}".join(lines)


def one_line(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.split())


def make_assets(demo: Demo) -> None:
    """Fetch or make model and data, unless an earlier demo did."""
    if demo.config == "smollm2":
        step("model and data", *script("assets.py"), str(demo.assets))
    elif not (demo.assets / "heldout.jsonl").is_file():
        step("model and data", *script("tiny.py"), str(demo.assets))


def main() -> None:
    """Run every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("smollm2", "tiny"), nargs="?", default="smollm2")
    parser.add_argument("--flip", action="store_true", help="train on swapped labels: every number must go down")
    parser.add_argument("--peft", choices=("none", "lora"), default="none", help="train adapters instead of the model")
    options = parser.parse_args()
    if options.flip and options.name == "tiny":
        parser.error("--flip goes with smollm2")
    lora = options.peft == "lora"
    demo = Demo(
        config=options.name,
        out=ROOT / f"{options.name}{'_lora' if lora else ''}{'_flipped' if options.flip else ''}",
        assets=ROOT / options.name / "assets",
        train_file="train_flipped.jsonl" if options.flip else "train.jsonl",
        continuations=256 if options.name == "smollm2" else 64,
        further_steps=300 if options.name == "smollm2" else 50,
        lora=lora,
    )
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    make_assets(demo)
    train(demo)
    measure(demo)
    summarize(demo)


if __name__ == "__main__":
    main()
