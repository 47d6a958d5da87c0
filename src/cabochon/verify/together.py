"""Two models side by side on the same input, one module of each at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cabochon.engine.cache import CachePlan, PagedCache
from cabochon.engine.request import Prompt
from cabochon.engine.runner import Runner, new_sequence
from cabochon.engine.scheduler import Scheduled
from cabochon.gemma4.model import Gemma4
from cabochon.nn.experts import Experts, Router
from cabochon.nn.linear import Linear
from cabochon.nn.norm import LayerNorm, RMSNorm
from cabochon.verify.distance import Distance, distance
from cabochon.verify.halting import Call, Halting, paired
from cabochon.verify.stage import Progress

# Modules that can be run again by themselves, on the original's inputs.
_LAYER = re.compile(r"model\.language_model\.layers\.\d+")
ALONE = (Linear, RMSNorm, LayerNorm, Experts)


@dataclass(frozen=True, slots=True)
class ModuleError:
    """How one module of a model departs from the original's.

    Attributes:
        reached: of its output from the original's, each on its own model's inputs.
        added: the same when it is given the original's inputs; None if it cannot run alone.
        spread: of the original's module from itself, when its rows are computed in two parts.
    """

    name: str
    reached: Distance
    added: Distance | None
    spread: float


@dataclass(frozen=True, slots=True)
class Logits:
    """What came out in the end: `[tokens, vocab_size]` each."""

    original: Tensor
    found: Tensor


class Walked:
    """Says how far a stage is that walks through a model's decoder layers once for each prompt."""

    def __init__(self, model: Gemma4, prompts: int, progress: Progress | None) -> None:
        self._all = len(model.config.text.layers) * prompts
        self._done = 0
        self._progress = progress

    def __call__(self, name: str) -> None:
        """A module has been compared."""
        if _LAYER.fullmatch(name) and self._progress is not None:
            self._done += 1
            self._progress(self._done, self._all)


@torch.inference_mode()
def together(original: Gemma4, found: Gemma4, prompt: Prompt) -> Iterator[ModuleError | Logits]:
    """Every module's departure from the original's, in the order of execution; then the logits.

    The prompt goes through in one step, so it should not be longer than a few hundred tokens.
    """
    with (
        Halting(original, lambda: logits_of(original, prompt)) as first,
        Halting(found, lambda: logits_of(found, prompt)) as second,
    ):
        for _, theirs, ours in paired(first, second, names_of(found), lambda call: call):
            if theirs is not None and ours is not None:
                yield from _compared(theirs, ours)
        yield Logits(first.result, second.result)


@torch.inference_mode()
def logits_of(model: Gemma4, prompt: Prompt) -> Tensor:
    """Of every position of `prompt`, in one step: `[tokens, vocab_size]`."""
    length = len(prompt.tokens)
    runner = Runner(model, torch.float32, torch.device("cpu"))
    plan = CachePlan.single(model.config.text, length, length)
    cache = PagedCache(plan, runner.dtype, runner.device)
    sequence = new_sequence(model, prompt, cache)
    chunk = sequence.chunk(length)
    reserved = cache.reserve(chunk)
    assert reserved
    step = Scheduled(sequence, chunk)
    runner.encode(step)
    return runner.logits(runner.run(cache, [step], every=True))


def names_of(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in model.named_modules())


def outcome(call: Call) -> Tensor | None:
    """What a module made, in figures that can be compared."""
    if isinstance(call.module, Router):
        return shares(call.output, len(call.module.per_expert_scale))
    output = call.output
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def shares(choice: tuple[Tensor, Tensor], count: int) -> Tensor:
    """A router's choice as what each expert gets: `[tokens, count]`."""
    given, experts = choice
    return given.new_zeros(len(given), count).scatter(1, experts, given)


def added(module: nn.Module, expected: Call) -> Tensor | None:
    """What `module` makes of the inputs of another model's."""
    if not isinstance(module, ALONE):
        return None
    made: Tensor = module.forward(*expected.inputs)
    return made


def _compared(expected: Call, found: Call) -> Iterator[ModuleError]:
    theirs, ours = outcome(expected), outcome(found)
    if theirs is None or ours is None:
        return
    alone = added(found.module, expected)
    yield ModuleError(
        found.name,
        distance(theirs, ours),
        None if alone is None else distance(theirs, alone),
        spread(expected.module, expected.inputs, theirs),
    )


def spread(module: nn.Module, inputs: Sequence[Any], whole: Tensor) -> float:
    """How far a module departs from the `whole` that it made when it gets its rows in two parts."""
    half = len(whole) // 2
    if not isinstance(module, ALONE) or not half:
        return 0.0
    parts = [_some(inputs, slice(0, half)), _some(inputs, slice(half, None))]
    again = torch.cat([module.forward(*some) for some in parts])
    return distance(whole, again).relative


def _some(inputs: Sequence[Any], rows: slice) -> list[Tensor]:
    return [tensor[rows] for tensor in inputs]
