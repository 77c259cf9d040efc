"""NeMo 1.x archives of torch files: the Hugging Face model they were made from comes back, nothing in them runs."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import hf_models
import nemo_archives
import pytest
import tiny
import torch
import yaml
from nemo_archives import changed, rank_state, torch_archive
from safetensors.torch import load_file

from nemo_kto.checkpoint import nemo_weights
from nemo_kto.checkpoint.nemo_archive import pack
from nemo_kto.checkpoint.nemo_model import model_directory
from nemo_kto.config.architecture import read_architecture
from nemo_kto.data.encode import load_tokenizer
from nemo_kto.errors import CheckpointError

SIZES = {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {case: hf_models.make(case, folder, **SIZES) for case in ("llama_tied", "qwen2")}
    made["llama"] = tiny.make_model(folder / "llama", dtype="bfloat16", **SIZES)
    return made


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same(found: Path, expected: Path) -> None:
    one, other = stored(found), stored(expected)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype, name
        assert torch.equal(one[name], tensor), name


@pytest.mark.parametrize(
    ("case", "tp", "pp", "prefix"),
    [
        ("llama", 1, 1, "model."),
        ("llama", 2, 1, "model.module."),
        ("llama", 1, 2, "model."),
        ("llama_tied", 2, 2, "model."),
        ("qwen2", 2, 1, "model."),
    ],
)
def test_the_model_comes_back_from_every_layout(case, tp, pp, prefix, models, tmp_path):
    archive = torch_archive(tmp_path / "x.nemo", models[case], tp, pp, prefix)
    found = model_directory(archive, tmp_path / "cache")
    assert_same(found, models[case])
    arch = read_architecture(found)
    assert arch == read_architecture(models[case])
    tokenizer = load_tokenizer(found)
    assert tokenizer("lovely great")["input_ids"] == load_tokenizer(models[case])("lovely great")["input_ids"]
    config = json.loads((found / "config.json").read_text())
    assert config["dtype"] == ("bfloat16" if case == "llama" else "float32")
    assert config["eos_token_id"] == 2
    assert "model_weights.ckpt" not in str(list(found.rglob("*")))


def test_large_models_are_written_in_several_files(models, tmp_path, monkeypatch):
    monkeypatch.setattr(nemo_weights, "_MAX_FILE_BYTES", 100_000)
    found = model_directory(torch_archive(tmp_path / "x.nemo", models["llama"], 2), tmp_path / "cache")
    assert len(list(found.glob("model-0*-of-0*.safetensors"))) > 1
    assert_same(found, models["llama"])
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(found)  # the index is one


# --- what does not fit


def refused(archive: Path, tmp_path: Path, tokenizer: Path | None = None) -> str:
    with pytest.raises(CheckpointError) as error:
        model_directory(archive, tmp_path / "cache", tokenizer)
    assert all(path.suffix == ".lock" for path in (tmp_path / "cache").iterdir()), "something was left"
    assert str(tmp_path / "cache") not in str(error.value), "the archive is named, not where it was unpacked"
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 3}, "no weights for model.layers.2.input_layernorm.weight and 5 more"),
        ({"num_layers": 1}, "layers.1.self_attention.linear_qkv.layer_norm_weight is unexpected"),
        ({"hidden_size": 128, "kv_channels": 16}, "makes model.embed_tokens.weight [399, 64], not [399, 128]"),
        ({"num_attention_heads": 2}, "self_attention.linear_qkv.weight"),
        ({"share_embeddings_and_output_weights": True}, "holds model.output_layer.weight a second time"),
        ({"override_vocab_size": 513}, "has 512 rows, fewer than the tokenizer's 513 entries"),
        ({"override_vocab_size": 398}, "override_vocab_size: 398 is no number from 399"),
        ({"override_vocab_size": "${vocab}"}, "override_vocab_size: '${vocab}'"),
        ({"mcore_gpt": False}, "x.nemo/model_config.yaml: mcore_gpt: False"),
        ({"tokenizer": {"library": "huggingface", "type": "meta-llama/Llama-2-7b"}}, "from-nemo --tokenizer DIR"),
        ({"tokenizer": None}, "from-nemo --tokenizer DIR"),
        ({"tokenizer": {"library": "sentencepiece", "model": "nemo:absent.model"}}, "nemo:absent.model is not in"),
        ({"tokenizer": {"library": "sentencepiece", "model": "nemo:../../../etc/passwd"}}, "is not in the archive"),
        (
            {"tokenizer": {"library": "sentencepiece", "model": "nemo:0123abcd_tokenizer.json"}},
            "0123abcd_tokenizer.json is no sentencepiece model",
        ),
    ],
)
def test_weights_that_do_not_fit_the_settings_are_refused(settings, message, models, tmp_path):
    assert message in refused(torch_archive(tmp_path / "x.nemo", models["llama"], **settings), tmp_path)


def saved(file: Path, edit) -> None:
    with torch.serialization.safe_globals([io.BytesIO]):
        state = torch.load(file, weights_only=True)
    edit(state)
    torch.save(state, file)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.update({"model.language_model.encoder.x": torch.ones(1)}), "without Megatron-Core"),
        (lambda s: s.update({"model.decoder.layers.0.mlp.router.weight": torch.ones(1)}), "mlp.router.weight"),
        (
            lambda s: s.update({"model.decoder.layers.0.self_attention.linear_qkv.bias": torch.ones(1)}),
            "is unexpected",
        ),
        (lambda s: s.update({"model.decoder.final_layernorm.weight": "word"}), "is no dense tensor of floating"),
        (lambda s: s.update({"model.decoder.final_layernorm.weight": torch.ones(64, dtype=torch.int64)}), "no dense"),
        (lambda s: s.pop("model.decoder.layers.1.mlp.linear_fc2.weight"), "no weights for model.layers.1.mlp.down"),
    ],
)
def test_tensors_that_do_not_belong_are_named(edit, message, models, tmp_path):
    archive = changed(torch_archive(tmp_path / "x.nemo", models["llama"]), lambda file: saved(file, edit))
    assert message in refused(archive, tmp_path)


def test_a_missing_rank_is_named(models, tmp_path):
    archive = torch_archive(tmp_path / "x.nemo", models["llama"], 2, 2)
    changed(archive, lambda file: file.unlink() if "tp_rank_01_pp_rank_000" in str(file) else None)
    assert "no model_weights.ckpt of tensor rank 1 and pipeline rank 0" in refused(archive, tmp_path)


def test_no_weights_at_all_are_named(models, tmp_path):
    archive = changed(torch_archive(tmp_path / "x.nemo", models["llama"]), Path.unlink)
    assert "holds neither model_weights/ nor model_weights.ckpt" in refused(archive, tmp_path)


@pytest.mark.parametrize("data", [b"", b"not torch's", b"PK\x03\x04 cut"])
def test_a_broken_file_is_named(data, models, tmp_path):
    archive = changed(torch_archive(tmp_path / "x.nemo", models["llama"]), lambda file: file.write_bytes(data))
    assert "x.nemo/model_weights.ckpt" in refused(archive, tmp_path)


# --- hostility


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("wrap", [lambda h: h, lambda h: {"model.decoder.final_layernorm.weight": h}])
@pytest.mark.parametrize("plain", [False, True])
def test_a_pickle_in_the_weights_does_not_run(wrap, plain, models, tmp_path):
    mark = tmp_path / "ran"
    bad = wrap(Hostile(mark))
    write = (lambda file: file.write_bytes(pickle.dumps(bad))) if plain else (lambda file: torch.save(bad, file))
    message = refused(changed(torch_archive(tmp_path / "x.nemo", models["llama"]), write), tmp_path)
    assert "x.nemo/model_weights.ckpt" in message
    if not plain:
        assert "which may run code" in message
    assert not mark.exists()
    torch.save(bad, tmp_path / "proof")
    torch.load(tmp_path / "proof", weights_only=False)
    assert mark.exists(), "the pickle was harmless: this test shows nothing"


def test_code_beside_a_tokenizer_does_not_run(models, tmp_path):
    """An archive of ours whose config.json and tokenizer_config.json name classes in files that come along."""
    mark = tmp_path / "ran"
    found = model_directory(torch_archive(tmp_path / "x.nemo", models["llama"]), tmp_path / "made")
    folder = tmp_path / "contents"
    (folder / "hf").mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(found / file, folder / "hf" / file)
    (folder / "hf" / "evil.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Evil: pass\n")
    for file, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        values = json.loads((folder / "hf" / file).read_text())
        values["auto_map"] = {key: "evil.Evil" if key[4] == "M" else ["evil.Evil", None], "AutoConfig": "evil.Evil"}
        (folder / "hf" / file).write_text(json.dumps(values))
    tensors = nemo_archives.megatron_tensors(models["llama"], rows=512)
    torch.save(rank_state(tensors, (0, 1), (0, 1)), folder / "model_weights.ckpt")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(nemo_archives.nemo_settings(models["llama"])))
    pack(folder, tmp_path / "evil.nemo")
    place = model_directory(tmp_path / "evil.nemo", tmp_path / "cache")
    assert read_architecture(place) == read_architecture(models["llama"])
    load_tokenizer(place)
    assert_same(place, models["llama"])
    assert not mark.exists()


def test_settings_and_config_json_must_agree(models, tmp_path):
    folder = tmp_path / "contents"
    shutil.copytree(models["llama"], folder / "hf")
    settings = nemo_archives.nemo_settings(models["llama"], rotary_base=77.0)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(settings))
    pack(folder, tmp_path / "x.nemo")
    assert "describe different networks" in refused(tmp_path / "x.nemo", tmp_path)
