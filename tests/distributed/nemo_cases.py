"""What the ranks of test_nemo.py do: archives written and read at every layout, and NeMo 1.x's distributed ones."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import nemo_archives
import torch
import torch.distributed as dist
from training_kit import Run, Setup

MODELS = ("tied", "untied")


def relay(rank: int, root: Path) -> None:
    """Train at TP 2, save; take over at PP 2, save again."""
    from nemo_kto.checkpoint.nemo_save import save_nemo

    for model in MODELS:
        run = Run(Setup(tp=2, lr=1e-2), root / model)
        run.train(1)
        save_nemo(run.chunks, run.arch, run.hf_dir, root / f"{model}-tp2.nemo", run.groups)
        export(run, root / f"{model}-tp2")
        taken = Network(unpacked(root, f"{model}-tp2.nemo"), pp=2)
        save_nemo(taken.chunks, taken.arch, taken.hf_dir, root / f"{model}-pp2.nemo", taken.groups)


def relay_end(rank: int, root: Path) -> None:
    """One rank takes over what the pipeline saved."""
    for model in MODELS:
        export(Network(unpacked(root, f"{model}-pp2.nemo")), root / f"{model}-end")


class Network:
    """A model directory's weights at some layout, and nothing else."""

    def __init__(self, place: Path, tp: int = 1, pp: int = 1) -> None:
        from nemo_kto import cpu_backend, launch

        cpu_backend.install()
        from nemo_kto.checkpoint.weights import load_weights
        from nemo_kto.config.architecture import read_architecture
        from nemo_kto.config.locate import hf_side
        from nemo_kto.gpt.build import PlainNetwork, build_gpt

        self.hf_dir = hf_side(place)
        self.arch = read_architecture(self.hf_dir)
        self.groups = launch.start(tp, pp)
        self.chunks = build_gpt(self.arch, PlainNetwork(), bf16=False, groups=self.groups)
        load_weights(self.chunks, self.arch, place, self.groups)


def unpacked(root: Path, name: str) -> Path:
    from nemo_kto.checkpoint.nemo_model import model_directory

    return model_directory(root / name, root / "cache")


def export(run: Run | Network, out: Path) -> None:
    from nemo_kto.checkpoint.hf_export import export_hf

    export_hf(run.chunks, run.arch, run.groups, run.hf_dir, out)


def failed_save(rank: int, root: Path) -> dict[str, object]:
    """A disk that fills up while the archive is packed."""
    from nemo_kto.checkpoint import nemo_archive
    from nemo_kto.checkpoint.nemo_save import save_nemo

    run = Run(Setup(tp=2), root / "tied")
    save_nemo(run.chunks, run.arch, run.hf_dir, root / "full.nemo", run.groups)
    before = (root / "full.nemo").read_bytes()
    run.train(1)
    write, message = nemo_archive._write, ""
    nemo_archive._write = _disk_full
    try:
        save_nemo(run.chunks, run.arch, run.hf_dir, root / "full.nemo", run.groups)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    nemo_archive._write = write
    dist.barrier()
    left = sorted(path.name for path in root.iterdir() if "full.nemo" in path.name)
    return {"message": message, "kept": before == (root / "full.nemo").read_bytes(), "left": left}


def _disk_full(*_: object) -> None:
    raise OSError(28, "No space left on device")


# --- NeMo 1.x's distributed checkpoints


def write_nemo1(rank: int, root: Path) -> None:
    """Archives as NeMo 1.x's connector makes them from ``model.sharded_state_dict()``, by one rank."""
    from nemo_kto import cpu_backend

    cpu_backend.install()
    for model in ("tied", "untied", "qwen2"):
        distributed_archive(root / f"{model}-nemo1.nemo", root / model)


def distributed_archive(out: Path, hf_dir: Path, **settings: object) -> Path:
    from megatron.core import dist_checkpointing

    folder = out.with_suffix(".contents")
    (folder / "model_weights").mkdir(parents=True)
    dist_checkpointing.save(_sharded(hf_dir), str(folder / "model_weights"))
    return nemo_archives.nemo_archive(out, folder, hf_dir, **settings)


def _sharded(hf_dir: Path) -> dict[str, object]:
    """Layers stacked under one name, and Transformer Engine's pickled scales, which nobody may ask for."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    tensors = nemo_archives.megatron_tensors(hf_dir, rows=512)
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    state: dict[str, object] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "layers" in parts:
            key = "model." + ".".join(parts[:2] + parts[3:])
            place = (0, int(parts[2]), layers)
            state[name] = ShardedTensor.from_rank_offsets(key, tensor, place, prepend_axis_num=1)
        else:
            state[name] = ShardedTensor.from_rank_offsets(f"model.{name}", tensor)
    for layer in range(layers):
        key = "model.decoder.layers.self_attention.core_attention._extra_state"
        state[f"extra {layer}"] = ShardedObject(key, io.BytesIO(b"scales"), (layers,), (layer,))
    return state


def read_nemo1(rank: int, root: Path) -> None:
    """Read them at TP 2 and at PP 2."""
    for model in ("tied", "untied", "qwen2"):
        place = unpacked(root, f"{model}-nemo1.nemo")
        for layout in ("tp", "pp"):
            export(Network(place, **{layout: 2}), root / f"{model}-nemo1-{layout}")


# --- hostility


class Hostile:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def hostile(rank: int, root: Path) -> dict[str, tuple[str, bool]]:
    """Archives with a pickle in each place that torch or Megatron would unpickle: message, and whether it ran."""
    changes = {"index": _evil_index, "common state": _evil_common, "extra state": _evil_extra, "object": _evil_object}
    changes |= {"zarr": _zarr, "bias": _bias}
    found = {}
    for name, change in changes.items():
        archive, mark = root / f"evil-{name}.nemo", root / f"ran-{name}"
        folder = archive.with_suffix(".contents")
        shutil.copytree(unpacked(root, "untied-nemo1.nemo"), folder / "model_weights")
        shutil.rmtree(folder / "model_weights" / "hf")
        (folder / "model_weights" / "manifest.json").unlink()
        change(folder / "model_weights", mark)
        nemo_archives.nemo_archive(archive, folder, root / "untied")
        message = "loaded"
        try:
            Network(unpacked(root, archive.name))
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        found[name] = (message, mark.exists())
    return found


def _evil_index(folder: Path, mark: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(mark)))


def _evil_common(folder: Path, mark: Path) -> None:
    torch.save({"state": Hostile(mark)}, folder / "common.pt")


def _edit_index(folder: Path, edit) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    edit(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def _evil_extra(folder: Path, mark: Path) -> None:
    """Bytes of an object that a reader of the whole checkpoint would unpickle; ours asks for tensors alone."""

    def edit(index) -> None:
        key = next(key for key in index.state_dict_metadata if "_extra_state" in key)
        info = next(info for place, info in index.storage_data.items() if place.fqn == key)
        data = bytearray((folder / info.relative_path).read_bytes())
        stream = io.BytesIO()
        torch.save(Hostile(mark), stream)
        info.offset, info.length = len(data), len(stream.getvalue())
        (folder / info.relative_path).write_bytes(bytes(data) + stream.getvalue())

    _edit_index(folder, edit)


def _evil_object(folder: Path, mark: Path) -> None:
    """The same object under the name of a weight."""
    _evil_extra(folder, mark)

    def edit(index) -> None:
        key = next(key for key in index.state_dict_metadata if "_extra_state" in key)
        index.state_dict_metadata["model.decoder.final_layernorm.weight"] = index.state_dict_metadata[key]

    _edit_index(folder, edit)


def _zarr(folder: Path, mark: Path) -> None:
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))


def _bias(folder: Path, mark: Path) -> None:
    """A tensor that these settings know nothing of: Megatron alone would leave it out in silence."""

    def edit(index) -> None:
        name = "model.decoder.layers.self_attention.linear_qkv."
        index.state_dict_metadata[f"{name}bias"] = index.state_dict_metadata[f"{name}layer_norm_weight"]

    _edit_index(folder, edit)


def proof(rank: int, root: Path) -> bool:
    """That the objects above do run where they are unpickled."""
    torch.save(Hostile(root / "ran-proof"), root / "proof.pt")
    torch.load(root / "proof.pt", weights_only=False)
    return (root / "ran-proof").exists()
