"""Devices and memory, and what accelerates what: asked of torch and Megatron in a process of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nemo_kto.doctor.cgroups import memory_limit
from nemo_kto.doctor.children import Child
from nemo_kto.doctor.findings import Finding

_DEVICES_S = 240.0
_GIB = 2**30
_NVIDIA = Path("/dev/nvidia0")


def count_gpus() -> int:
    """GPUs that torch sees, for a rank that looks at nothing else; 0 where it cannot tell."""
    with Child("nemo_kto.doctor.inspecting") as child:
        topics = {answer["topic"]: answer for answer in child.answers(_DEVICES_S)}
    return len(topics.get("devices", {}).get("devices", []))


def devices(torch: dict[str, Any], found: dict[str, Any]) -> Finding:
    """Processors, memory and GPUs."""
    finding = Finding("devices", "devices and memory")
    _processors(finding, torch)
    finding.facts |= {"torch": torch, "gpus": found.get("devices", [])}
    if "error" in torch or "error" in found:
        error = torch.get("error") or found.get("error")
        finding.lines.append(f"GPUs: torch cannot tell: {error}")
        finding.wrong(
            f"torch cannot list devices ({error})", "no training can start", "see torch under packages", blocks=True
        )
        return finding
    cuda = f"CUDA {torch['cuda']}, NCCL {torch['nccl'] or 'absent'}" if torch["cuda"] else "no CUDA in this build"
    finding.lines.append(f"torch {torch['version']}: {cuda}")
    for gpu in found["devices"]:
        _gpu(finding, gpu)
    if not found["devices"]:
        _no_gpu(finding, torch, found["why_none"])
    elif torch["nccl"] is None:
        finding.wrong(
            "torch sees GPUs and was built without NCCL",
            "ranks on GPUs talk over NCCL",
            "use the container image's torch, or pip install a CUDA build of torch",
            blocks=True,
        )
    return finding


def acceleration(megatron: dict[str, Any], network: dict[str, Any]) -> Finding:
    """Which implementation does what, of those that are there."""
    finding = Finding("acceleration", "what accelerates what", {"megatron": megatron, "network": network})
    for name, topic in (("megatron.core", megatron), ("the network's parts", network)):
        if "error" in topic:
            finding.lines.append(f"{name} cannot be looked at: {topic['error']}")
            finding.wrong(
                f"{name} cannot be imported ({topic['error']})", "no training can start", "see packages", blocks=True
            )
    if "error" not in network:
        finding.lines += [
            f"layers: {network['layers']}",
            f"norm: {network['norm']}",
            f"attention: {network['attention']}",
        ]
    if "error" not in megatron:
        on = [name for name, enabled in megatron["sdpa"].items() if enabled]
        patches = megatron["cpu_patches"]
        finding.lines += [
            f"torch's attention kernels that are allowed on GPUs: {', '.join(on) or 'none'}",
            f"optimizer: {megatron['optimizer']}",
            f"gradient norm and clipping: {megatron['multi_tensor']}",
            f"Megatron's own choice of norm, where its layers are used as they are: {megatron['layer_norm']}",
            f"CPU stand-ins for CUDA calls: {', '.join(patches) or 'none'}",
        ]
    return finding


def _processors(finding: Finding, torch: dict[str, Any]) -> None:
    import psutil

    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory()
    limit = memory_limit()
    usable = min(memory.available, limit or memory.available)
    finding.facts |= {
        "cores": cores,
        "memory_bytes": memory.total,
        "available_bytes": memory.available,
        "memory_limit_bytes": limit,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }
    capability = torch.get("cpu_capability")
    finding.lines.append(f"{cores} cores this process may use{f' ({capability})' if capability else ''}")
    allowed = "" if limit is None else f", of which this job or container may use {limit / _GIB:.1f}"
    finding.lines.append(f"memory: {memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} available{allowed}")
    if usable < 2 * _GIB:
        finding.wrong(
            f"{usable / _GIB:.1f} GiB of memory are left",
            "importing the stack takes 1 to 2 GiB per process, before any weights",
            "end other programs, or give the job or container more memory (sbatch --mem, docker run --memory)",
        )


def _gpu(finding: Finding, gpu: dict[str, Any]) -> None:
    capability = ".".join(map(str, gpu["capability"]))
    free, total = gpu["free_bytes"] / _GIB, gpu["memory_bytes"] / _GIB
    finding.lines.append(
        f"GPU {gpu['index']}: {gpu['name']}, {total:.1f} GiB, {free:.1f} free, compute capability {capability}"
    )
    if free < 0.9 * total:
        finding.wrong(
            f"GPU {gpu['index']} has {free:.1f} of {total:.1f} GiB free",
            "something else uses it; a training needs what is planned for it",
            "see nvidia-smi, and end what should not be there",
        )
    if not gpu["bf16"]:
        finding.wrong(
            f"GPU {gpu['index']} ({gpu['name']}) has no bf16",
            "trainer.precision=bf16 is the default",
            "train with trainer.precision=32, or on compute capability 8.0 or later",
        )


def _no_gpu(finding: Finding, torch: dict[str, Any], why: str) -> None:
    finding.lines.append("no GPU: trainings run on the CPU, over gloo")
    if _NVIDIA.exists():
        build = "this torch is built without CUDA" if torch["cuda"] is None else why or "torch does not say why"
        finding.wrong(
            f"there is a GPU ({_NVIDIA}), and torch does not see it: {build}",
            "trainings would run on the CPU",
            "use the container image's torch (pip list shows whether another has replaced it), and see that "
            "CUDA_VISIBLE_DEVICES is not empty and that nvidia-smi works",
            blocks=True,
        )
    elif torch["cuda"] is not None:
        finding.wrong(
            f"torch is built for CUDA {torch['cuda']} and sees no device{f' ({why})' if why else ''}",
            "trainings would run on the CPU",
            "start the container with --gpus all, ask Slurm for --gpus-per-node, or ignore it where there is no GPU",
        )
