"""Cabochon runs quantized Gemma 4 right: a checkpoint loads exactly, or is refused by name.

`LLM` and `SamplingParams` are imported when first asked for, so that `cabochon inspect` and
`--help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cabochon.garbage import uncollected

if TYPE_CHECKING:
    from cabochon.engine.request import SamplingParams
    from cabochon.llm import LLM
    from cabochon.load.obtain import inspect_model as inspect

__all__ = ["LLM", "SamplingParams", "__version__", "inspect"]

__version__ = "0.1.0"

_WHERE = {
    "LLM": ("cabochon.llm", "LLM"),
    "SamplingParams": ("cabochon.engine.request", "SamplingParams"),
    "inspect": ("cabochon.load.obtain", "inspect_model"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'cabochon' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    with uncollected():
        return getattr(import_module(module), attribute)
