"""How far a model that rounds activations is from itself, when it only adds in another order.

Rounding makes a step of a last bit, and the layers behind it make the step larger; so two right
models differ, and by how much is a property of the file. The measure of it is the oracle's own: the
same layers and the same weights, with sums in another order, and in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from reference import logits
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import cosine_similarity
from upstream import Experts

from cabochon.engine.request import Prompt

PIECES = (2, 4)  # in which a product's sums are made, one after the other
EXACT = 1e-4  # what a file is held to on which no rounding falls to the other side


def distances(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """One minus the cosine: at the worst position, and on average."""
    apart = 1 - cosine_similarity(ours.double(), theirs.double(), dim=-1)
    return float(apart.max()), float(apart.mean())


def own(model: Any, prompt: Prompt) -> tuple[float, float]:
    """The largest distances of `model` from itself; it is one of float64 afterwards."""
    usual = logits(model, prompt)
    found = [distances(other, usual) for other in _others(model, prompt)]
    worst, mean = zip(*found, strict=True)
    return max(worst), max(mean)


def _others(model: Any, prompt: Prompt) -> Iterator[Tensor]:
    for count in PIECES:
        with _summed(count):
            yield logits(model, prompt)
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Experts):
            for layer in module.forward.layers.values():
                layer.double()
    yield logits(model.double(), prompt)


@contextmanager
def _summed(count: int) -> Iterator[None]:
    """Products are sums of `count` products of fewer columns."""
    whole = functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        pieces = zip(x.chunk(count, -1), weight.chunk(count, -1), strict=True)
        y = sum((whole(a, b) for a, b in pieces), torch.zeros(()))
        return y if bias is None else y + bias

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", linear)
        yield


def within_its_own(ours: Tensor, model: Any, prompt: Prompt) -> None:
    """`ours` are as near to the logits of `model` as those are to themselves."""
    found, limit = distances(ours, logits(model, prompt)), own(model, prompt)
    for name, far, most in zip(("worst", "mean"), found, limit, strict=True):
        assert far <= max(EXACT, 2 * most), f"{name}: {far:.3g}, its own {most:.3g}"
