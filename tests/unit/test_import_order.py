"""Megatron's constants are rewritten as it is imported (nemo_kto/cpu_backend.py): that must be set up before."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent.parent / "nemo_kto"


def imports_megatron(path: Path) -> bool:
    """Whether importing the module imports Megatron, itself or through NeMo."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(name.split(".")[0] in ("megatron", "nemo") for name in names):
            return True
    return False


def test_every_room_that_imports_megatron_is_entered_through_the_backend():
    rooms = {path.parent for path in PACKAGE.rglob("*.py") if imports_megatron(path)}
    assert {"gpt", "checkpoint", "training"} <= {room.name for room in rooms}
    for room in rooms:
        source = (room / "__init__.py").read_text(encoding="utf-8")
        assert "\ninstall()\n" in source, f"{room.name}/__init__.py must call cpu_backend.install()"


def test_megatron_first_is_refused_with_the_reason():
    """Only a package of that name is needed, not its seconds of imports."""
    code = (
        "import sys, types\n"
        "sys.modules['megatron.core.parallel_state'] = types.ModuleType('megatron.core.parallel_state')\n"
        "import torch\n"
        "torch.cuda.is_available = lambda: False\n"
        "import nemo_kto.training\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "install() must run before megatron.core is imported" in done.stderr
