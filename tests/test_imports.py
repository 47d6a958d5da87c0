"""Dependencies point one way, and model files know nothing of names, ranks or quantization."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
from torch import nn

import cabochon

ROOT = Path(cabochon.__file__).parent

# What each part may need, directly or through others. Between these there is no way back.
_FILES = {"errors", "files"}
_MODEL = {*_FILES, "config", "nn", "gemma4"}
_LOAD = {*_MODEL, "checkpoint", "quant"}
_ENGINE = {*_MODEL, "text"}
_ASSEMBLY = {*_ENGINE, *_LOAD, "load", "engine", "prompts", "kernels", "options", "survey"}
_LLM = {*_ASSEMBLY, "assembly", "garbage", "linking"}
_APP = {*_LLM, "llm", "settings", "flags", "console", "cabochon"}

MAY_NEED = {
    "errors": set(),
    "console": set(),
    "files": {"errors"},
    "config": _FILES,
    "checkpoint": _FILES,
    "text": _FILES,
    "nn": {*_FILES, "config"},
    "kernels": _MODEL,
    "quant": {*_FILES, "config", "nn", "checkpoint"},
    "gemma4": _MODEL - {"gemma4"},
    "load": _LOAD,
    "engine": _ENGINE,
    "prompts": {*_ENGINE, "engine"},
    "options": {*_MODEL, "kernels"},
    "survey": {*_LOAD, "load", "kernels"},
    "assembly": _ASSEMBLY,
    "garbage": set(),
    "linking": set(),
    "llm": _LLM,
    "settings": {"errors"},
    "flags": {"errors", "settings"},
    "conversation": {*_LLM, "llm"},
    "cabochon": {*_LLM, "llm"},  # the package's own names, imported when they are asked for
    "serve": {*_LLM, "llm", "settings", "console", "cabochon"},
    "verify": {*_LLM, "llm", "cabochon"},
    "evaluate": {*_LLM, "llm"},
    "bench": {*_LLM, "llm"},
    "cli": {*_APP, "conversation", "serve", "verify", "evaluate", "bench"},
    "__main__": {*_APP, "conversation", "serve", "verify", "evaluate", "bench", "cli"},
}

TORCHLESS = (
    "cabochon",
    "cabochon.config",
    "cabochon.errors",
    "cabochon.files",
    "cabochon.settings",
    "cabochon.checkpoint.headers",
    "cabochon.checkpoint.folder",
    "cabochon.quant.scheme",
    "cabochon.quant.claims",
    "cabochon.quant.resolve",
    "cabochon.quant.families",
    "cabochon.load.tree",
    "cabochon.load.names",
    "cabochon.load.plan",
    "cabochon.load.planner",
    "cabochon.load.report",
    "cabochon.load.card",
    "cabochon.load.certificate",
    "cabochon.load.explain",
    "cabochon.load.obtain",
    "cabochon.load.places",
    "cabochon.survey",
    "cabochon.llm",
)


def modules_of(package: str) -> Iterator[Path]:
    yield from sorted((ROOT / package).rglob("*.py"))


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str:
    return module.removeprefix("cabochon.").partition(".")[0]


def imports_of(file: Path, modules: Collection[str]) -> set[str]:
    """Those of `modules` that `file` imports, wherever in it: in functions too, and for types."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            module = node.module or ""
            named |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    found = named & set(modules)
    return found | {name.rpartition(".")[0] for name in found} - {"", "cabochon"}


def needs() -> dict[str, dict[str, str]]:
    """For each module all that it needs, each with the module that imports it."""
    files = {dotted(file): file for file in modules_of(".")}
    direct = {module: imports_of(file, files) for module, file in files.items()}
    found: dict[str, dict[str, str]] = {}
    for module in files:
        seen: dict[str, str] = {}
        queue = [module]
        for importer in queue:
            new = direct[importer] - set(seen)
            seen |= dict.fromkeys(new, importer)
            queue += new
        found[module] = seen
    return found


def test_every_part_is_in_the_table() -> None:
    assert {part_of(dotted(file)) for file in modules_of(".")} == set(MAY_NEED)


def test_needs_point_one_way() -> None:
    for part, others in MAY_NEED.items():
        assert part not in others
        for other in others:
            assert MAY_NEED[other] <= others, f"{part} may need {other}, but not what that needs"


def test_no_part_needs_what_it_may_not() -> None:
    needed = needs()
    assert "cabochon.errors" in needed["cabochon.cli"]  # through others
    for module, seen in needed.items():
        part = part_of(module)
        for other, importer in seen.items():
            allowed = part_of(other) in MAY_NEED[part] | {part}
            assert allowed, f"{module} needs {other}, which {importer} imports"


@pytest.mark.parametrize("module", TORCHLESS)
def test_planning_imports_no_torch(module: str) -> None:
    program = f"import sys, {module}; print('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_torch_is_linked_before_it_is_imported() -> None:
    program = """
import sys
from pathlib import Path
from cabochon.linking import link_torch
link_torch().join()
print("libtorch_cpu" in Path("/proc/self/maps").read_text(), "torch" in sys.modules)
import torch
print(torch.arange(4.0).sum().item())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False", "6.0"]


def test_torch_that_is_not_there_cannot_be_linked(tmp_path: Path) -> None:
    program = "from cabochon.linking import link_torch; link_torch().join(); print('went on')"
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT.parent}"}
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("went on\n", "")


def test_model_files_take_no_names_ranks_or_quantization() -> None:
    seen = 0
    for package in ("gemma4", "nn"):
        for file in modules_of(package):
            module = importlib.import_module(dotted(file))
            for _, kind in inspect.getmembers(module, inspect.isclass):
                if kind.__module__ != module.__name__ or not issubclass(kind, nn.Module):
                    continue
                seen += 1
                for parameter in inspect.signature(kind.__init__).parameters:
                    assert parameter not in {"prefix", "name", "rank", "world", "dtype"}, kind
                    assert not parameter.startswith("quant"), kind
    assert seen > 15


def test_nothing_that_is_read_can_become_code() -> None:
    """No pickles, no `torch.load`, no `eval`; jinja in its sandbox alone."""
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    calls = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "Environment"}
    for file in modules_of("."):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not modules & {alias.name for alias in node.names}, file
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in modules, file
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, f"{file}:{node.lineno}"
