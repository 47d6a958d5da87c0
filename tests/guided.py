"""Two models that round activations, compared without the chaos that rounding makes of noise.

The order of sums moves an activation in its last bits; once in a while that puts it across the
border between two numbers it may be rounded to, and a few layers later all is different, in one
model as right as in the other. So an oracle says where it rounds (`seam`), and is given there what
our model rounds in the same place, as soon as it has been seen that the two are the same, row by
row. No border is ever crossed by one of them alone, and whatever else differs is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from conftest import hiss, noise
from reference import logits, relative_error
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from cabochon import LLM
from cabochon.engine.request import Prompt

CLOSE = 1e-5  # as a share of the largest entry; sums in another order were seen to move one by 1e-6
# A rounding of ours: its matrix, within what else surrounds that, or within a stack of experts'.
ROUNDING = re.compile(r"(.+)\.weight(?:\.inner)*(?:\.parts\.(\d+))?(?:\.inner)*\.(inputs|outputs)")

Rounded = dict[str, list[Tensor]]  # by the matrix's name in checkpoints and its end, call by call

_guide: ContextVar[Rounded | None] = ContextVar("guide", default=None)


def seam(name: str, x: Tensor) -> Tensor:
    """What an oracle is about to round, `x`, or, while it is guided, what we round there.

    Args:
        name: of the matrix in checkpoints, and `.inputs` or `.outputs`.
    """
    guide = _guide.get()
    if guide is None:
        return x
    assert guide.get(name), f"{name} is not rounded by ours, or less often"
    return _checked(name, x, guide[name].pop(0))


def rounds(
    name: str,
    product: Callable[[Tensor], Tensor],
    inputs: Callable[[Tensor], Tensor] | None,
    outputs: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[Tensor], Tensor]:
    """A layer whose `product` is made of rounded activations, and rounded itself."""

    def forward(x: Tensor) -> Tensor:
        y = product(x if inputs is None else inputs(seam(f"{name}.inputs", x)))
        return y if outputs is None else outputs(seam(f"{name}.outputs", y))

    return forward


def same_logits(folder: Path, model: Any) -> None:
    """The checkpoint in `folder` gives the logits of `model`, of which both round activations.

    Of text, a picture, and a sound where the model hears.
    """
    with LLM(folder, dtype="float32") as llm:
        ours, theirs = guided_logits(llm, model, prompt_of(llm))
    assert cosine_similarity(ours, theirs, dim=-1).min() > 0.9999
    assert relative_error(ours, theirs) < 1e-4


def prompt_of(llm: LLM) -> Prompt:
    ids = llm.config.tokens
    sounds = [hiss(5_000)] if llm.config.audio is not None else []
    media = [ids.image, 280, *[ids.audio] * len(sounds)]
    tokens = [2, 4, *range(300, 320), *media, *range(320, 340), 5]
    return llm.prompts.raw(tokens, [noise(100, 60)], sounds)


def guided_logits(llm: LLM, model: Any, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Our logits, and those of the oracle that rounds what we round."""
    with _recorded(llm.runner.model) as rounded:
        ours = llm.logits(prompt)
    token = _guide.set(rounded)
    try:
        theirs = logits(model, prompt)
    finally:
        _guide.reset(token)
    left = [name for name, calls in rounded.items() if calls]
    assert not left, f"not rounded by the oracle: {left}"
    return ours, theirs


@contextmanager
def _recorded(model: nn.Module) -> Iterator[Rounded]:
    """What our model rounds."""
    rounded: Rounded = {}
    hooks = []
    for path, module in model.named_modules():
        name = _name(path)
        if name is not None:

            def record(_: nn.Module, given: tuple[Tensor], name: str = name) -> None:
                rounded.setdefault(name, []).append(given[0].detach().clone())

            hooks.append(module.register_forward_pre_hook(record))
    try:
        yield rounded
    finally:
        for hook in hooks:
            hook.remove()


def _name(path: str) -> str | None:
    """A rounding of our model as `seam` names it; None: the module is none."""
    match = ROUNDING.fullmatch(path)
    if match is None:
        return None
    module, part, end = match.groups()
    if part is None:
        return f"{module}.{end}"
    experts, _, leaf = module.rpartition(".")
    if leaf == "down_proj":
        return f"{experts}.{part}.down_proj.{end}"
    number, half = divmod(int(part), 2)
    return f"{experts}.{number}.{('gate', 'up')[half]}_proj.{end}"


def _checked(name: str, theirs: Tensor, ours: Tensor) -> Tensor:
    """`ours` in the shape of `theirs`, which may be padded."""
    rows = theirs.reshape(-1, theirs.shape[-1])
    guided = rows.clone()
    rows, ours = rows[: len(ours)], ours.reshape(-1, ours.shape[-1])
    off = (rows - ours).abs().amax(dim=1) > CLOSE * rows.abs().max()
    assert not off.any(), f"{name}: {int(off.sum())} of {len(off)} rows differ"
    guided[: len(ours)] = ours
    return guided.view_as(theirs)
