"""Which packages are there, in which version, and whether they can be imported."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from nemo_kto.doctor.children import Child
from nemo_kto.doctor.findings import Finding

IMPORT_S = 300.0
"""All imports together: a cold network file system takes minutes."""


@dataclass(frozen=True)
class Package:
    """A package as people know it, its distribution, and the module whose import shows that it works."""

    name: str
    distribution: str
    module: str
    required: bool = True


TOPICS = ("torch", "devices", "megatron", "network")
PACKAGES = (
    Package("torch", "torch", "torch"),
    Package("Megatron-Core", "megatron-core", "megatron.core.parallel_state"),
    Package("Lightning", "lightning", "lightning.pytorch"),
    Package("transformers", "transformers", "transformers"),
    Package("NeMo", "nemo_toolkit", "nemo.core.classes"),
    Package("Transformer Engine", "transformer_engine", "transformer_engine.pytorch", required=False),
    Package("Apex", "apex", "apex.optimizers", required=False),
    Package("Apex's kernels", "apex", "amp_C", required=False),
    Package("flash-attn", "flash_attn", "flash_attn", required=False),
    *(Package(name, name, name) for name in ("omegaconf", "safetensors", "pyarrow", "psutil")),
    Package("hydra", "hydra-core", "hydra"),
    Package("einops", "einops", "einops"),
    Package("sentencepiece", "sentencepiece", "sentencepiece"),
)


def probe(seconds: float = IMPORT_S) -> tuple[Finding, dict[str, dict[str, Any]]]:
    """Import everything that a training imports, in another process, and compare versions with what is declared.

    Returns:
        What was found; and what torch and Megatron said in that process of themselves, by topic.
    """
    finding = Finding("packages", "packages")
    installed = {package.distribution: installed_version(package.distribution) for package in PACKAGES}
    wanted = [package for package in PACKAGES if package.required or _is_there(package, installed)]
    results, topics = _import([package.module for package in wanted], seconds)
    finding.facts = {"python": platform.python_version()}
    finding.lines.append(f"Python {platform.python_version()}")
    for package in PACKAGES:
        result = results.get(package.module, {"error": None})
        version = installed[package.distribution] or result.get("version")
        finding.facts[package.name] = {
            "version": version,
            "imports": "version" in result,
            "error": result.get("error"),
        }
        _line(finding, package, version, result)
    _judge_apex(finding, installed["apex"])
    _judge_versions(finding)
    return finding, topics


def installed_version(distribution: str) -> str | None:
    """Of what is installed; None if it is not, or its metadata cannot be read."""
    try:
        return metadata.version(distribution)
    except Exception:  # broken metadata raise anything
        return None


def _is_there(package: Package, installed: dict[str, str | None]) -> bool:
    """A real Apex is often built in place and has no metadata, so it is looked for in any case."""
    return installed[package.distribution] is not None or package.distribution in ("apex", "transformer_engine")


def _import(modules: list[str], seconds: float) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The result of each, and of each topic. One that ends the process is blamed; the rest is tried in a new one."""
    results: dict[str, dict[str, Any]] = {}
    topics: dict[str, dict[str, Any]] = {}
    how = ""
    deadline = time.monotonic() + seconds
    while left := [module for module in modules if module not in results]:
        current = left[0]
        with Child("nemo_kto.doctor.importing", *left) as child:
            for answer in child.answers(deadline - time.monotonic()):
                if "topic" in answer:
                    topics[answer.pop("topic")] = answer
                    continue
                current = answer["module"]
                if "begins" not in answer:
                    results[current] = answer
            how = child.end()
        if current in modules and current not in results:
            results[current] = {"error": how or "its process ended"}
        if child.timed_out:
            for module in left:
                results.setdefault(module, {"error": f"not tried: {current} took all of {seconds:.0f} s"})
    for topic in TOPICS:
        topics.setdefault(topic, {"error": how or "no answer"})
    return results, topics


def _line(finding: Finding, package: Package, version: str | None, result: dict[str, Any]) -> None:
    error = result.get("error")
    if "version" in result:
        finding.lines.append(f"{package.name} {version or '(no version)'}")
    elif package.distribution == "apex":
        return  # told by _judge_apex
    elif not package.required and (version is None and _absent(package.module, error)):
        finding.lines.append(f"{package.name}: not installed, and not needed")
    else:
        finding.lines.append(f"{package.name} {version or '(not installed)'}: import fails: {error}")
        absent = version is None and _absent(package.module, error)
        finding.wrong(
            f"{package.name} {'is not installed' if absent else f'cannot be imported ({error})'}",
            "every training imports it" if package.required else "Megatron tries it first, and may stop at the error",
            f"pip install {package.distribution}"
            if absent
            else f"reinstall it against this torch, or remove it: pip uninstall {package.distribution}",
            blocks=package.required,
        )


def _absent(module: str, error: str | None) -> bool:
    return error is None or (error.startswith("ModuleNotFoundError") and f"'{module.split('.')[0]}'" in error)


def _judge_apex(finding: Finding, installed: str | None) -> None:
    """The ``apex`` on the package index is another project; and NVIDIA's can be built without its kernels."""
    python, kernels = finding.facts["Apex"], finding.facts["Apex's kernels"]
    if python["imports"] and kernels["imports"]:
        return
    if python["imports"]:
        finding.lines.append("Apex: its Python part alone, without the kernels that would make it faster")
        finding.wrong(
            f"Apex was built without its CUDA kernels (amp_C: {kernels['error']})",
            "Megatron falls back to torch where it could use them",
            "build it with --cpp_ext --cuda_ext, or leave it out",
        )
    elif installed is not None and _absent("apex.optimizers", python["error"]) is False:
        finding.lines.append(f"apex {installed}: not NVIDIA's Apex (no apex.optimizers), and of no use here")
        finding.wrong(
            f"the package apex {installed} is not NVIDIA's Apex ({python['error']})",
            "PyPI's apex is another project; it speeds up nothing here and may confuse what looks for Apex",
            "pip uninstall apex; NVIDIA's comes with its container images",
        )
    elif _absent("apex.optimizers", python["error"]):
        finding.lines.append("Apex: not installed, and not needed")
    else:
        finding.lines.append(f"Apex: import fails: {python['error']}")
        finding.wrong(
            f"Apex cannot be imported ({python['error']})",
            "Megatron tries it where there is no Transformer Engine, and may stop at the error",
            "rebuild it against this torch, or remove it: pip uninstall apex",
        )


def _judge_versions(finding: Finding) -> None:
    """Installed versions against the bounds that nemo_kto declares."""
    try:
        from packaging.requirements import Requirement

        declared = [Requirement(text) for text in metadata.requires("nemo_kto") or []]
    except Exception:  # run from its source tree, or without packaging
        finding.lines.append("nemo_kto is not installed as a package: the bounds of its requirements are not compared")
        return
    for requirement in declared:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            finding.wrong(
                f"{requirement.name} {version} is outside {requirement.specifier}",
                "nemo_kto has been tested within these bounds",
                f"pip install '{requirement.name}{requirement.specifier}', unless a container image brought this one",
            )
