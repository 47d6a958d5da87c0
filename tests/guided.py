"""Two models that round activations, compared without the chaos that rounding makes of noise.

The order of sums moves an activation in its last bits; once in a while that puts it across the
border between two numbers it may be rounded to, and a few layers later all is different, in one
model as right as in the other. So each quantized layer of the reference is given what went into
ours, as soon as it has been seen that the two agree in nearly all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import noise
from ct import on_disk
from reference import logits, relative_error
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from cabochon import LLM
from cabochon.engine.request import Prompt
from cabochon.nn.activations import RoundedWeight
from cabochon.nn.experts import Experts
from cabochon.nn.linear import Linear
from cabochon.nn.weight import Stack

CLOSE = 1e-4  # as a share of the largest entry
ACROSS = 0.05  # rows that may lie across a border


@contextmanager
def entered(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What goes into the layers of our model, by name."""
    inputs: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if _rounds(module):

            def record(_module: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                inputs.setdefault(name, given[0].detach().clone())

            hooks.append(module.register_forward_pre_hook(record))
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _rounds(module: nn.Module) -> bool:
    if isinstance(module, Experts):
        return _rounds(module.gate_up_proj)
    weight = module.weight if isinstance(module, Linear) else None
    return isinstance(weight.parts[0] if isinstance(weight, Stack) else weight, RoundedWeight)


def same_logits(folder: Path, model: Any, *, picture: bool = True) -> None:
    """The checkpoint in `folder` gives the logits of `model`, of which both round activations."""
    images = (noise(100, 60),) if picture else ()
    # Without kernels: they add up in another order, and are held to these products by themselves.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cabochon.assembly.library", lambda: None)
        llm = LLM(folder, dtype="float32")
    with llm:
        tokens = [2, 4, *range(300, 320), *[llm.config.tokens.image] * picture, *range(320, 340), 5]
        prompt = llm.prompts.raw(tokens, images)
        ours, theirs = guided_logits(llm, model, prompt, images)
    assert cosine_similarity(ours, theirs, dim=-1).min() > 0.9999
    assert relative_error(ours, theirs) < 1e-4


def guided_logits(
    llm: LLM, model: Any, prompt: Prompt, images: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """Our logits, and those of the reference whose layers see our activations."""
    with entered(llm.runner.model) as inputs:
        ours = llm.logits(list(prompt.tokens), images)
    hooks, seen = [], []
    for name, module in model.named_modules():
        given = inputs.get(on_disk(name, model))
        if given is not None:

            def guide(
                _module: nn.Module,
                theirs: tuple[Tensor, ...],
                name: str = name,
                ours: Tensor = given,
            ) -> tuple[Tensor, ...]:
                seen.append(on_disk(name, model))
                return _checked(name, theirs[0], ours), *theirs[1:]

            hooks.append(module.register_forward_pre_hook(guide))
    try:
        theirs = logits(model, prompt)
    finally:
        for hook in hooks:
            hook.remove()
    assert set(seen) == set(inputs)
    return ours, theirs


def _checked(name: str, theirs: Tensor, ours: Tensor) -> Tensor:
    """`ours` in the shape of `theirs`, which may be padded."""
    rows = theirs.reshape(-1, theirs.shape[-1])
    guided = rows.clone()
    rows, ours = rows[: len(ours)], ours.reshape(-1, ours.shape[-1])
    off = (rows - ours).abs().amax(dim=1) > CLOSE * rows.abs().max()
    assert off.float().mean() <= ACROSS, f"{name}: {int(off.sum())} of {len(off)} rows differ"
    guided[: len(ours)] = ours
    return guided.view_as(theirs)
