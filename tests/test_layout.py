"""Imports point downward: kernels know nothing of minitensor, minitensor nothing of gpt, nobody of torch."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "kernels": {"minitensor", "gpt", "examples", "torch"},
    "minitensor": {"gpt", "examples", "torch"},
    "gpt": {"examples", "torch"},
    "examples": {"torch"},
}


def imported(file: Path) -> set[str]:
    """The top-level names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_nobody_imports_upward(package):
    for file in (ROOT / package).rglob("*.py"):
        upward = imported(file) & FORBIDDEN[package]
        assert not upward, f"{file.relative_to(ROOT)} imports {', '.join(sorted(upward))}"


def test_import_takes_no_more_than_numpy_and_numba():
    command = [sys.executable, "-c", "import sys, minitensor; print(*sys.modules)"]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "minitensor" in loaded
    assert not {"torch", "hypothesis", "matplotlib", "safetensors", "tqdm", "gpt"} & set(loaded)
