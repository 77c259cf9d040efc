"""Archives for tests: ours, NeMo 1.x's, and single tar members of every kind."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

FILES = {"model_config.yaml": b"a: 1\n", "model_weights/__0_0.distcp": bytes(range(256)) * 40, "hf/empty": b""}


def fill(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def foreign(path: Path, files: dict[str, bytes] = FILES, mode: str = "w", **options) -> Path:
    """An archive as NeMo 1.x makes it: one ``tar.add`` of a folder as ``.``; no manifest."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(path, mode, **options) as archive:
        archive.add(fill(Path(folder)) if files is FILES else fill(Path(folder), files), arcname=".")
    return path


def entries(path: Path, *infos: tarfile.TarInfo, mode: str = "w") -> Path:
    """An archive of single members, each with as many bytes of ``x`` as it says."""
    with tarfile.open(path, mode) as archive:
        for info in infos:
            archive.addfile(info, io.BytesIO(b"x" * info.size))
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


# --- NeMo 1.x's layouts, made from a Hugging Face directory without the product's own name map


def nemo_settings(hf_dir: Path, **change: object) -> dict[str, object]:
    """``model_config.yaml`` as NeMo's converters write it."""
    config = json.loads((hf_dir / "config.json").read_text())
    return {
        "mcore_gpt": True,
        "transformer_engine": True,
        "encoder_seq_length": config["max_position_embeddings"],
        "max_position_embeddings": config["max_position_embeddings"],
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config.get("head_dim"),
        "bias": False,
        "qkv_bias": config["model_type"] == "qwen2",
        "activation": "fast-swiglu",
        "normalization": "rmsnorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "share_embeddings_and_output_weights": config["tie_word_embeddings"],
        "make_vocab_size_divisible_by": 128,
        "tokenizer": {
            "library": "huggingface",
            "type": "nemo:0123abcd_tokenizer.json",
            "special_tokens": {"eos_token": "<|im_end|>"},
        },
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
        **change,
    }


def megatron_tensors(hf_dir: Path, rows: int) -> dict[str, torch.Tensor]:
    """Unsharded Megatron tensors under Transformer Engine's names, the vocabulary filled up to ``rows`` with noise."""
    config = json.loads((hf_dir / "config.json").read_text())
    hf = load_file(hf_dir / "model.safetensors")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads

    def padded(name: str) -> torch.Tensor:
        return torch.cat([hf[name], torch.randn(rows - hf[name].shape[0], hf[name].shape[1], dtype=hf[name].dtype)])

    def qkv(layer: str, kind: str) -> torch.Tensor:
        q, k, v = (hf[f"{layer}.self_attn.{name}_proj.{kind}"].split(size) for name in "qkv")
        each = heads // groups
        return torch.cat([row for g in range(groups) for row in (*q[g * each : (g + 1) * each], k[g], v[g])])

    found = {"embedding.word_embeddings.weight": padded("model.embed_tokens.weight")}
    for number in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{number}", f"decoder.layers.{number}"
        found |= {
            f"{new}.self_attention.linear_qkv.layer_norm_weight": hf[f"{old}.input_layernorm.weight"],
            f"{new}.self_attention.linear_qkv.weight": qkv(old, "weight"),
            f"{new}.self_attention.linear_proj.weight": hf[f"{old}.self_attn.o_proj.weight"],
            f"{new}.mlp.linear_fc1.layer_norm_weight": hf[f"{old}.post_attention_layernorm.weight"],
            f"{new}.mlp.linear_fc1.weight": torch.cat(
                [hf[f"{old}.mlp.gate_proj.weight"], hf[f"{old}.mlp.up_proj.weight"]]
            ),
            f"{new}.mlp.linear_fc2.weight": hf[f"{old}.mlp.down_proj.weight"],
        }
        if config["model_type"] == "qwen2":
            found[f"{new}.self_attention.linear_qkv.bias"] = qkv(old, "bias")
    found["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    if not config["tie_word_embeddings"]:
        found["output_layer.weight"] = padded("lm_head.weight")
    return found


def rank_state(
    tensors: dict[str, torch.Tensor], tp: tuple[int, int], pp: tuple[int, int], prefix: str = "model."
) -> dict[str, object]:
    """What NeMo's ``state_dict()`` holds on one rank: (index, size) of its tensor- and pipeline-parallel place."""
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    per_stage = layers // pp[1]
    state: dict[str, object] = {}
    for name, tensor in tensors.items():
        if ".layers." in name:
            number = int(name.split(".")[2])
            if number // per_stage != pp[0]:
                continue
            name = name.replace(f".{number}.", f".{number % per_stage}.", 1)
        elif (name.startswith("embedding") and pp[0] > 0) or (not name.startswith("embedding") and pp[0] < pp[1] - 1):
            continue
        if name.endswith("linear_fc1.weight"):
            tensor = torch.cat([half.chunk(tp[1])[tp[0]] for half in tensor.chunk(2)])
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            tensor = tensor.chunk(tp[1], dim=1)[tp[0]]
        elif "norm" not in name:
            tensor = tensor.chunk(tp[1])[tp[0]]
        state[prefix + name] = tensor.clone()
    if "output_layer.weight" not in tensors and pp[1] > 1 and pp[0] == pp[1] - 1:
        copy = tensors["embedding.word_embeddings.weight"].chunk(tp[1])[tp[0]]
        state[f"{prefix}output_layer.weight"] = copy.clone()
    state[f"{prefix}decoder.layers.0.self_attention.core_attention._extra_state"] = io.BytesIO(b"scales")
    return state


def torch_archive(
    out: Path, hf_dir: Path, tp: int = 1, pp: int = 1, prefix: str = "model.", **settings: object
) -> Path:
    """A NeMo 1.x archive with ``model_weights.ckpt`` of every rank."""
    folder = out.with_suffix(".contents")
    tensors = megatron_tensors(hf_dir, rows=512)
    for stage in range(pp):
        for rank in range(tp):
            name = f"tp_rank_{rank:02d}_pp_rank_{stage:03d}" if pp > 1 else f"mp_rank_{rank:02d}" if tp > 1 else ""
            (folder / name).mkdir(parents=True, exist_ok=True)
            torch.save(rank_state(tensors, (rank, tp), (stage, pp), prefix), folder / name / "model_weights.ckpt")
    return nemo_archive(out, folder, hf_dir, **settings)


def nemo_archive(out: Path, folder: Path, hf_dir: Path, **settings: object) -> Path:
    """Add settings and tokenizer to weights, and pack all as NeMo does; ``folder`` goes."""
    (folder / "model_config.yaml").write_text(yaml.safe_dump(nemo_settings(hf_dir, **settings)))
    shutil.copyfile(hf_dir / "tokenizer.json", folder / "0123abcd_tokenizer.json")
    with tarfile.open(out, "w") as archive:
        archive.add(folder, arcname=".")
    shutil.rmtree(folder)
    return out


def changed(archive: Path, change: Callable[[Path], object]) -> Path:
    """The archive with its ``model_weights.ckpt`` given to ``change(path)``."""
    folder = archive.with_suffix(".changed")
    with tarfile.open(archive) as old:
        old.extractall(folder, filter="data")
    for file in sorted(folder.rglob("model_weights.ckpt")):
        change(file)
    with tarfile.open(archive, "w") as new:
        new.add(folder, arcname=".")
    shutil.rmtree(folder)
    return archive
