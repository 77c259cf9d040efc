"""The house rules that a machine can check in the code: floors, sizes, forbidden calls."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "nemo_kto"
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50

FLOORS = {
    **dict.fromkeys(
        ["errors", "config", "objective", "distributed", "cpu_backend", "quiet", "launch", "interrupts"], 1
    ),
    **dict.fromkeys(["parents", "peers"], 1),
    "data": 2,
    "gpt": 3,
    "checkpoint": 4,
    "reference": 4,
    "training": 5,
    "planning": 5,
    "doctor": 5,
    "cli": 6,
}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call))


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"  # type: ignore[attr-defined]


# --- floors


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in python_files("nemo_kto")}


def imports(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Modules of this package that a file imports, wherever in the file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names if alias.name.startswith("nemo_kto"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(path, node)}: relative import"
            if (node.module or "").split(".")[0] == "nemo_kto":
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield (full if full in MODULES else str(node.module)), node


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def import_edges() -> Iterator[tuple[str, str, str]]:
    """Importer, imported, place. The package's own ``__init__`` is its front door, open to every floor."""
    for module, path in MODULES.items():
        if module != "nemo_kto":
            yield from ((module, target, where(path, node)) for target, node in imports(path) if target != "nemo_kto")


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some circle in ``graph``; empty if there is none."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            found = visit(target, [*trail, node])
            if found:
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_every_room_has_a_floor():
    rooms = {room_of(module) for module in MODULES} - {""}
    assert rooms <= FLOORS.keys()


def test_a_floor_imports_only_from_floors_below():
    wrong = []
    for importer, imported, place in import_edges():
        own, other = room_of(importer), room_of(imported)
        # The rooms of the ground floor may use each other (without a circle: next test); those above may not.
        if own != other and not (FLOORS[other] < FLOORS[own] or FLOORS[own] == FLOORS[other] == 1):
            wrong.append(f"{place}: {importer} imports {imported}, which is not below it")
    assert not wrong, "\n".join(wrong)


def test_the_front_door_is_not_used_from_inside():
    for module, path in MODULES.items():
        for target, node in imports(path):
            if target == "nemo_kto" and module != "nemo_kto":
                names = {alias.name for alias in getattr(node, "names", ())}
                assert names <= {"__version__"}, f"{where(path, node)}: {names} through nemo_kto/__init__.py"


def test_no_circles():
    modules: dict[str, set[str]] = {}
    rooms: dict[str, set[str]] = {}
    for importer, imported, _ in import_edges():
        modules.setdefault(importer, set()).add(imported)
        if room_of(importer) != room_of(imported):
            rooms.setdefault(room_of(importer), set()).add(room_of(imported))
    assert circle(modules) == []
    assert circle(rooms) == []


def test_circle_finds_one():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


# --- sizes


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's docstring, which may hold a worked example."""
    first = node.body[0]
    return first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0


@pytest.mark.parametrize("folder", ["nemo_kto", "examples", "benchmarks", "tests"])
def test_files_and_functions_are_short(folder):
    wrong = []
    for path in python_files(folder):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            wrong.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1 - docstring_lines(node)
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{where(path, node)}: {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


# --- forbidden calls


def test_torch_load_reads_weights_only():
    for path in python_files("nemo_kto", "examples", "benchmarks"):
        for call in calls(path):
            if ast.unparse(call.func) == "torch.load":
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
                assert safe, f"{where(path, call)}: torch.load without weights_only=True runs what the file says"


def test_print_only_on_the_command_line():
    for path in python_files("nemo_kto"):
        if "cli" not in path.relative_to(PACKAGE).parts:
            for call in calls(path):
                assert ast.unparse(call.func) != "print", f"{where(path, call)}: print outside cli/"


def imported_names(path: Path) -> set[str]:
    nodes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {(alias.asname or alias.name).split(".")[0] for node in nodes for alias in node.names}


def patched_objects(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Attributes of imported modules or classes, and entries of sys.modules, that a file assigns or deletes."""
    names = imported_names(path)
    for node in ast.walk(tree(path)):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            targets = [ast.Attribute(node.args[0], "?")]
        for target in targets:
            text = ast.unparse(target)
            is_attribute = isinstance(target, ast.Attribute) and re.split(r"\W", text)[0] in names
            if is_attribute or text.startswith("sys.modules["):
                yield text, node


def test_only_the_cpu_backend_patches():
    settings = ("torch.backends.",)  # switches that torch offers, not replaced code
    for path in python_files("nemo_kto"):
        if path.name != "cpu_backend.py":
            for text, node in patched_objects(path):
                assert text.startswith(settings), f"{where(path, node)}: patches {text}"


def test_patches_are_recognised(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(
        "import torch, sys\nfrom megatron import Thing\nlocal = object()\n"
        "local.a = 1\nself.torch = 2\nx = torch.a\nx[0] = torch.b\n"  # none of these patches
        "torch.cuda.f = 1\nThing.method = 2\nsetattr(Thing, 'a', 3)\nsys.modules['b'] = 4\ndel torch.c\n"
    )
    assert sorted(node.lineno for _, node in patched_objects(path)) == [8, 9, 10, 11, 12]
