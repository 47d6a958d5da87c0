"""What goes into every module of a model and what comes out, in the order of execution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cabochon.nn.weight import Weight


@dataclass(frozen=True, slots=True)
class Seen:
    """One call of one module."""

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    output: Tensor


class Watch:
    """Collects calls until they are taken; `take` often, so that little is held."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []

    def take(self) -> list[Seen]:
        seen, self._seen = self._seen, []
        return seen

    def saw(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            self._seen.append(Seen(name, module, inputs, output))


@contextmanager
def watching(model: nn.Module) -> Iterator[Watch]:
    """Watch every module of `model` that has a name of its own. A weight is no module to a user."""
    watch = Watch()
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: watch.saw(name, module, inputs, output)
        )
        for name, module in model.named_modules()
        if name and not isinstance(module, Weight)
    ]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()
