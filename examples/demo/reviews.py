"""Human-rated review snippets -> unpaired KTO records ``{"prompt", "completion", "label"}``.

The snippets (movie and product reviews, each rated from -4 to 4 by twenty people; Hutto and Gilbert, ICWSM 2014; MIT
licence) lie inside the source archive of the vaderSentiment package. A snippet's first four words are the prompt, the
rest is the completion, and the sign of its mean rating is the label.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import json
import random
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

SOURCES = {"movieReviewSnippets": "Movie review:", "amazonReviewSnippets": "Product review:"}
NESTED = "additional_resources/hutto_ICWSM_2014.tar.gz"
PROMPT_WORDS = 4
MIN_COMPLETION_WORDS = 5
MIN_RATING = 0.5
HELDOUT_FRACTION = 0.05


@dataclass(frozen=True)
class Snippet:
    """One rated sentence, and the review it comes from."""

    group: str
    heading: str
    text: str
    rating: float


def read_snippets(sdist: Path) -> list[Snippet]:
    """All snippets, in the archive's order."""
    snippets = []
    with tarfile.open(sdist) as outer:
        member = next(name for name in outer.getnames() if name.endswith(NESTED))
        nested = outer.extractfile(member).read()
    with tarfile.open(fileobj=io.BytesIO(nested)) as inner:
        for source, heading in SOURCES.items():
            raw = inner.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt").read()
            for line in raw.decode("utf-8", "replace").splitlines():
                identifier, rating, text = line.split("\t")
                text = re.sub(r"\s+", " ", html.unescape(text).replace("''", '"')).strip()
                snippets.append(Snippet(f"{source}:{identifier.split('_')[0]}", heading, text, float(rating)))
    return snippets


def usable(snippets: list[Snippet]) -> list[Snippet]:
    """Leave out ambiguous ratings, short texts and repetitions."""
    seen: set[str] = set()
    kept = []
    for snippet in snippets:
        long_enough = len(snippet.text.split(" ")) >= PROMPT_WORDS + MIN_COMPLETION_WORDS
        if abs(snippet.rating) >= MIN_RATING and long_enough and snippet.text.lower() not in seen:
            seen.add(snippet.text.lower())
            kept.append(snippet)
    return kept


def is_heldout(group: str) -> bool:
    """Whether the review that a snippet comes from is held out: all its sentences stay on one side."""
    digest = hashlib.sha256(f"0:{group}".encode()).hexdigest()
    return int(digest[:8], 16) / 2**32 < HELDOUT_FRACTION


def to_record(snippet: Snippet, flip: bool = False) -> dict[str, str | bool]:
    """A training record. The completion keeps the space before it, so that the prompt's tokens are a prefix."""
    words = snippet.text.split(" ")
    return {
        "prompt": f"{snippet.heading} {' '.join(words[:PROMPT_WORDS])}",
        "completion": " " + " ".join(words[PROMPT_WORDS:]),
        "label": (snippet.rating > 0) != flip,
    }


def write(sdist: Path, out: Path) -> dict[str, int]:
    """Write ``train.jsonl``, ``train_flipped.jsonl`` and ``heldout.jsonl`` to ``out``, shuffled.

    Training on the flipped labels is the control: it must push the held-out numbers the other way.

    Args:
        sdist: source archive of vaderSentiment 3.3.2.
        out: directory to write to.

    Returns:
        The number of rows of each file.
    """
    snippets = usable(read_snippets(sdist))
    train = [s for s in snippets if not is_heldout(s.group)]
    heldout = [s for s in snippets if is_heldout(s.group)]
    random.Random(0).shuffle(train)
    random.Random(1).shuffle(heldout)
    files = {
        "train": [to_record(s) for s in train],
        "train_flipped": [to_record(s, flip=True) for s in train],
        "heldout": [to_record(s) for s in heldout],
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: len(records) for name, records in files.items()}


def main() -> None:
    """Make the files from a source archive at hand."""
    parser = argparse.ArgumentParser(description="vaderSentiment source archive -> training and held-out files")
    parser.add_argument("sdist", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    print(write(options.sdist, options.out))


if __name__ == "__main__":
    main()
