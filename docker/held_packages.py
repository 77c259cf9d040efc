"""What an image's build must not touch: records it before pip runs, and checks afterwards that it is still there.

``record`` writes three files. ``constraints.txt`` pins every held package that the image has to the version it has, so
that pip fails where something needs another. ``requirements.txt`` lists what ``pyproject.toml`` asks for, without what
the image has in a form that pip cannot see. ``held.json`` says what was there, for ``check``.

Run by the Dockerfile with the image's own Python (3.11 or later); needs nothing but pip.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import re
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import tomllib
from pip._vendor.packaging.requirements import Requirement

HELD = re.compile(
    r"torch|torch(vision|audio|ao|-tensorrt)|(pytorch-)?triton|megatron-.*|transformer-engine.*|apex|flash-attn.*"
    r"|nvidia-.*|cuda-.*|numpy"
)
"""Built for each other and for the image's CUDA; numpy, because they were compiled against it."""
MODULES = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "transformer-engine": "transformer_engine",
    "apex": "apex",
}
"""Package to module: an image may have one on its path only, with no metadata for pip."""


def fail(message: str) -> NoReturn:
    """End with one message."""
    raise SystemExit(f"error: {message}")


def canonical(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def module_place(module: str) -> str | None:
    """Where a module would be imported from; nothing heavy is imported to find out."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # its parent is absent
        return None
    if spec is None:
        return None
    return spec.origin or str(next(iter(spec.submodule_search_locations or [""])))


def held_packages() -> dict[str, dict[str, str]]:
    """Name to version and folder, of the held packages that pip sees; the first on the path counts, as for imports."""
    found: dict[str, dict[str, str]] = {}
    for package in importlib.metadata.distributions():
        name = canonical(package.metadata["Name"] or "")
        if HELD.fullmatch(name) and name not in found:
            found[name] = {"version": package.version, "folder": str(package.locate_file(""))}
    return found


def unseen_version(place: str) -> str | None:
    """The version of a module without metadata, from its ``package_info.py``: Megatron's way."""
    info = Path(place).parent / "package_info.py"
    version = runpy.run_path(str(info)).get("__version__") if info.is_file() else None
    return None if version is None else str(version)


def wanted(pyproject: Path, extras: Iterable[str], also: str) -> list[Requirement]:
    """What ``pyproject.toml`` asks for, and what the builder wants besides."""
    project: dict[str, Any] = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in [*lines, *also.split()]]


def still_to_install(wishes: list[Requirement], packages: dict[str, dict[str, str]]) -> list[str]:
    """The wishes as lines for pip; ends the build where one of ``pyproject.toml`` cannot go with the image."""
    lines = []
    for wish in wishes:
        name = canonical(wish.name)
        module = MODULES.get(name)
        place = module_place(module) if module and name not in packages else None
        version = packages[name]["version"] if name in packages else unseen_version(place) if place else None
        if place and version is None:
            fail(f"{module} is at {place}, with no version that could be read: use another BASE_IMAGE")
        if version is not None and not wish.specifier.contains(version, prereleases=True):
            fail(f"the image has {name} {version}, and {wish} is needed: use another BASE_IMAGE (docs/launch.md)")
        if place is None:
            lines.append(str(wish))
    return lines


def record(pyproject: Path, out: Path, extras: list[str], also: str) -> None:
    """Write the three files."""
    packages = held_packages()
    requirements = still_to_install(wanted(pyproject, extras, also), packages)
    modules = {module: place for module in MODULES.values() if (place := module_place(module))}
    out.mkdir(parents=True, exist_ok=True)
    pins = [f"{name}=={package['version']}" for name, package in sorted(packages.items())]
    (out / "constraints.txt").write_text("".join(f"{pin}\n" for pin in pins), encoding="utf-8")
    (out / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements), encoding="utf-8")
    (out / "held.json").write_text(json.dumps({"packages": packages, "modules": modules}, indent=1), encoding="utf-8")
    print("held as the image has them:", ", ".join(pins) or "nothing", flush=True)


def check(out: Path) -> None:
    """End the build where a held package is another, or elsewhere, than it was, or is shadowed by another."""
    before = json.loads((out / "held.json").read_text(encoding="utf-8"))
    packages = held_packages()
    changes = [
        f"{name}: {was['version']} in {was['folder']}, now {packages.get(name)}"
        for name, was in before["packages"].items()
        if packages.get(name) != was
    ]
    changes += [
        f"{module}: at {was}, now {module_place(module)}"
        for module, was in before["modules"].items()
        if module_place(module) != was
    ]
    if changes:
        fail("the install changed what the image had:\n  " + "\n  ".join(changes))
    print(f"{len(before['packages'])} held packages are as they were", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record", help="before pip runs")
    recording.add_argument("pyproject", type=Path)
    recording.add_argument("out", type=Path)
    recording.add_argument(
        "--extra", action="append", default=[], help="an extra of pyproject.toml to install as well"
    )
    recording.add_argument("--also", default="", help="more requirements, with spaces between them")
    verbs.add_parser("check", help="after pip has run").add_argument("out", type=Path)
    options = parser.parse_args()
    if options.verb == "record":
        record(options.pyproject, options.out, options.extra, options.also)
    else:
        check(options.out)


if __name__ == "__main__":
    sys.exit(main())
