"""The tokenizer of a NeMo 1.x archive: the same tokens as there, or an error that says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tiny
from nemo_archives import changed, contents, torch_archive

from nemo_kto.checkpoint.nemo_model import model_directory
from nemo_kto.config.architecture import read_architecture
from nemo_kto.data.encode import load_tokenizer
from nemo_kto.errors import CheckpointError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=1)


def sentencepiece_archive(tmp_path: Path, model: Path, **training: object) -> Path:
    text = [" ".join(tiny.WORDS[i : i + 9]) for i in range(60)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(tmp_path / "sp"), vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, **training,
    )  # fmt: skip
    archive = torch_archive(
        tmp_path / "x.nemo", model, tokenizer={"library": "sentencepiece", "model": "nemo:0123_sp.model"}
    )
    return changed(archive, lambda file: shutil.copyfile(tmp_path / "sp.model", file.parent / "0123_sp.model"))


def test_a_sentencepiece_model_gives_the_same_tokens(model, tmp_path):
    llama = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "pad_id": -1}
    archive = sentencepiece_archive(tmp_path, model, **llama)
    found = model_directory(archive, tmp_path / "cache")
    tokenizer = load_tokenizer(found)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    for text in ("the film is great", "  odd   spaces\n", "é 日 🙂", ""):
        assert tokenizer(text)["input_ids"] == [pieces.bos_id(), *pieces.EncodeAsIds(text)]
    assert read_architecture(found).vocab_size == len(tokenizer) == pieces.GetPieceSize()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (pieces.bos_id(), pieces.eos_id())
    assert "model.safetensors" in contents(found)


def test_a_sentencepiece_model_that_transformers_reads_otherwise_is_refused(model, tmp_path):
    archive = sentencepiece_archive(tmp_path, model, normalization_rule_name="nmt_nfkc_cf")
    with pytest.raises(CheckpointError, match=r"otherwise than sentencepiece does .* --tokenizer DIR"):
        model_directory(archive, tmp_path / "cache")
    found = model_directory(archive, tmp_path / "other", model)
    assert len(load_tokenizer(found)) == 399


def test_vocab_and_merges_give_gpt2s_tokenizer(model, tmp_path):
    backend = json.loads((model / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(backend["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    section = {"library": "megatron", "type": "GPT2BPETokenizer", "model": None}
    section |= {"vocab_file": "nemo:01_vocab.json", "merge_file": "nemo:02_merges.txt"}
    archive = torch_archive(tmp_path / "x.nemo", model, tokenizer=section)

    def add(file: Path) -> None:
        shutil.copyfile(tmp_path / "vocab.json", file.parent / "01_vocab.json")
        shutil.copyfile(tmp_path / "merges.txt", file.parent / "02_merges.txt")

    found = model_directory(changed(archive, add), tmp_path / "cache")
    text = "the lovely film is great"
    assert load_tokenizer(found)(text)["input_ids"] == load_tokenizer(model)(text)["input_ids"]


def test_a_given_tokenizer_takes_the_place_of_a_hub_name(model, tmp_path):
    section = {"library": "huggingface", "type": "meta-llama/Llama-2-7b"}
    archive = torch_archive(tmp_path / "x.nemo", model, tokenizer=section)
    found = model_directory(archive, tmp_path / "cache", model)
    assert read_architecture(found) == read_architecture(model)
    assert (found / "chat_template.jinja").is_file()
