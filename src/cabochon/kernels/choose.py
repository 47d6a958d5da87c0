"""Which kernel computes each matrix: decided once, when it is built, and told."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from cabochon.kernels.arena import Arena
from cabochon.kernels.backlog import Backlog
from cabochon.kernels.floats import FloatsWeight
from cabochon.kernels.library import Activations, Library
from cabochon.kernels.multiplied import Multiplied
from cabochon.kernels.packed import PackedWeight, unsupported
from cabochon.kernels.sketch import SketchedHead, sketchable
from cabochon.nn.weight import Coded, StoredFloats, Weight


class Kernels:
    """Puts kernels in the place of weights that describe themselves.

    Args:
        library: the compiled kernels; None: everything stays as `nn` computes it.
        activations: how inputs of quantized matrices are rounded.
        backlog: what fills them; they may compute when that is finished. Without one, at once.
    """

    def __init__(
        self,
        library: Library | None,
        activations: Activations,
        backlog: Backlog | None = None,
    ) -> None:
        self.activations = activations
        self._library = library
        self._backlog = backlog
        self._arena = None if library is None else Arena(library)
        self._chosen: Counter[str] = Counter()

    @property
    def built(self) -> bool:
        return self._library is not None

    def for_weight(self, weight: Weight, head: bool = False) -> Weight:
        """A weight that computes the same faster, or `weight` itself; `head`: it makes logits."""
        kernel = self._kernel(weight, head)
        if kernel is not None:
            return kernel
        if not self._inside(weight):
            self._chosen["PyTorch"] += 1
        return weight

    def _inside(self, module: nn.Module) -> bool:
        """Do the same for the weights that `module` is made of; whether there are any."""
        found = False
        for name, child in list(module.named_children()):
            if isinstance(child, Weight):
                setattr(module, name, self.for_weight(child))
                found = True
            else:
                found |= self._inside(child)
        return found

    def _kernel(self, weight: Weight, head: bool) -> Weight | None:
        library, described = self._library, weight.description()
        backlog, arena = self._backlog, self._arena
        if library is None or arena is None or described is None:
            return None
        if not _multipliable(described, exact=self.activations == "float32"):
            return None
        sketched = head and self.activations != "float32" and sketchable(weight, described)
        kernel: Multiplied
        if isinstance(described, StoredFloats):
            kernel = FloatsWeight(
                library, weight, move=None if sketched else arena, backlog=backlog
            )
        else:
            kernel = PackedWeight(
                library,
                described,
                self.activations,
                out_features=weight.out_features,
                in_features=weight.in_features,
                arena=arena,
                backlog=backlog,
                later=sketched,
            )
        self._chosen[_name(described, self.activations, sketched=sketched)] += 1
        if sketched:
            return SketchedHead(library, kernel, arena=arena, backlog=backlog)
        return kernel

    def enlarge(self) -> None:
        """Have large pages for what was put in weights' places, in a thread, while it is used."""
        if self._arena is not None:
            self._arena.enlarge()

    def describe(self) -> str:
        """What was chosen, for people."""
        if self._library is None:
            return (
                "the kernels were not built when cabochon was installed, for lack of a C++"
                " compiler: everything is computed in PyTorch, many times slower"
            )
        chosen = ", ".join(f"{count} of {kind}" for kind, count in self._chosen.most_common())
        return f"kernels for {self._library.isa}: {chosen}"


def _multipliable(described: Coded | StoredFloats, *, exact: bool) -> bool:
    """Whether kernels compute what `dense` says; `exact`: to the last bit."""
    if isinstance(described, StoredFloats):
        return not exact or described.rounded is torch.float32
    return unsupported(described) is None and (described.exact or not exact)


def _name(described: Coded | StoredFloats, activations: Activations, *, sketched: bool) -> str:
    how = ", the likeliest found by a sketch" if sketched else ""
    if isinstance(described, StoredFloats):
        return f"stored floats{how}"
    kind = "int" if described.values is None else "table"
    group = "row" if described.scales.shape[1] == 1 else f"{described.group}"
    return f"{kind}{described.bits} by {group}, activations {activations}{how}"
