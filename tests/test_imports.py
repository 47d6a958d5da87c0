"""Dependencies point one way, and model files know nothing of names, ranks or quantization."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import cabochon

ROOT = Path(cabochon.__file__).parent

# What a package may not import, directly or through others.
FORBIDDEN = {
    "checkpoint": {"quant", "load", "nn", "gemma4", "engine", "serve", "cli", "llm", "text"},
    "quant": {"load", "gemma4", "engine", "serve", "cli", "llm", "text"},
    "nn": {"checkpoint", "quant", "load", "gemma4", "engine", "serve", "cli", "llm", "text"},
    "gemma4": {"checkpoint", "quant", "load", "engine", "serve", "cli", "llm", "text"},
    "load": {"engine", "serve", "cli", "llm", "text"},
    "text": {"checkpoint", "quant", "load", "nn", "gemma4", "engine", "serve", "cli", "llm"},
    "engine": {"checkpoint", "quant", "load", "serve", "cli", "llm"},
}

TORCHLESS = (
    "cabochon",
    "cabochon.config",
    "cabochon.errors",
    "cabochon.checkpoint.headers",
    "cabochon.checkpoint.folder",
    "cabochon.quant.scheme",
    "cabochon.quant.claims",
    "cabochon.quant.resolve",
    "cabochon.load.tree",
    "cabochon.load.names",
    "cabochon.load.plan",
    "cabochon.load.report",
)


def modules_of(package: str) -> Iterator[Path]:
    yield from sorted((ROOT / package).rglob("*.py"))


def imports_of(file: Path) -> Iterator[str]:
    """The parts of cabochon that `file` names in an import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            module = node.module or ""
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        yield from (name.split(".")[1] for name in names if name.startswith("cabochon."))


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str) -> None:
    for file in modules_of(package):
        wrong = set(imports_of(file)) & FORBIDDEN[package]
        assert not wrong, f"{file} imports {sorted(wrong)}"


@pytest.mark.parametrize("module", TORCHLESS)
def test_planning_imports_no_torch(module: str) -> None:
    program = f"import sys, {module}; print('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_model_files_take_no_names_ranks_or_quantization() -> None:
    seen = 0
    for package in ("gemma4", "nn"):
        for file in modules_of(package):
            dotted = ".".join(file.relative_to(ROOT.parent).with_suffix("").parts)
            module = importlib.import_module(dotted.removesuffix(".__init__"))
            for _, kind in inspect.getmembers(module, inspect.isclass):
                if kind.__module__ != module.__name__ or not issubclass(kind, nn.Module):
                    continue
                seen += 1
                for parameter in inspect.signature(kind.__init__).parameters:
                    assert parameter not in {"prefix", "name", "rank", "world", "dtype"}, kind
                    assert not parameter.startswith("quant"), kind
    assert seen > 15
