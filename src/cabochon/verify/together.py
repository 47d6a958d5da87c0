"""Two models side by side on the same input, one decoder layer of each at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cabochon.engine.cache import CachePlan, CacheStep, PagedCache
from cabochon.engine.request import Prompt
from cabochon.engine.runner import Runner, new_sequence
from cabochon.engine.scheduler import Scheduled
from cabochon.gemma4.model import Gemma4
from cabochon.nn.experts import Experts
from cabochon.nn.linear import Linear
from cabochon.nn.norm import RMSNorm
from cabochon.verify.distance import Distance, distance
from cabochon.verify.watch import Seen, Watch, watching

# Modules that can be run again by themselves, on the original's inputs.
_ALONE = (Linear, RMSNorm, Experts)


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


class _Run:
    """One model on its way through one prompt."""

    def __init__(self, model: Gemma4, prompt: Prompt) -> None:
        text, length = model.config.text, len(prompt.tokens)
        self.model = model
        runner = Runner(model, torch.float32, torch.device("cpu"))
        cache = PagedCache(CachePlan.single(text, length, length), runner.dtype, runner.device)
        sequence = new_sequence(model, prompt, cache)
        chunk = sequence.chunk(length)
        reserved = cache.reserve(chunk)
        assert reserved
        step = [Scheduled(sequence, chunk)]
        runner.encode(step[0])
        self._batch = runner.batch(step, every=True)
        self._kv = CacheStep(cache, [chunk])

    def layers(self) -> Iterator[Tensor]:
        ids, x = self.model.embed(self._batch)
        text = self.model.model.language_model
        for rows, _ in text.walk(ids, x, self._batch.positions, self._kv, self._batch.wanted):
            yield rows

    def logits(self, rows: Tensor) -> Tensor:
        return self.model.logits(self.model.model.language_model.norm(rows))


@torch.inference_mode()
def together(original: Gemma4, found: Gemma4, prompt: Prompt) -> Iterator[ModuleError | Logits]:
    """Every module's departure from the original's, in the order of execution; then the logits.

    The prompt goes through in one step, so it should not be longer than a few hundred tokens.
    """
    with watching(original) as first, watching(found) as second:
        runs = _Run(original, prompt), _Run(found, prompt)
        yield from _compared(first, second)
        for last in zip(runs[0].layers(), runs[1].layers(), strict=True):
            yield from _compared(first, second)
            rows = last
        logits = Logits(runs[0].logits(rows[0]), runs[1].logits(rows[1]))
        yield from _compared(first, second)
    yield logits


def _compared(first: Watch, second: Watch) -> Iterator[ModuleError]:
    """Calls since the last time, in pairs; a module may be called more than once."""
    theirs: dict[str, list[Seen]] = {}
    for seen in first.take():
        theirs.setdefault(seen.name, []).append(seen)
    for seen in second.take():
        expected = theirs[seen.name].pop(0)
        yield ModuleError(
            seen.name,
            distance(expected.output, seen.output),
            _added(seen.module, expected),
            _spread(expected),
        )


def _added(module: nn.Module, expected: Seen) -> Distance | None:
    if not isinstance(module, _ALONE):
        return None
    return distance(expected.output, module.forward(*expected.inputs))


def _spread(expected: Seen) -> float:
    if not isinstance(expected.module, _ALONE) or len(expected.output) < 2:
        return 0.0
    half = len(expected.output) // 2
    parts = [_some(expected.inputs, slice(0, half)), _some(expected.inputs, slice(half, None))]
    again = torch.cat([expected.module.forward(*inputs) for inputs in parts])
    return distance(expected.output, again).relative


def _some(inputs: Sequence[Tensor], rows: slice) -> list[Tensor]:
    return [tensor[rows] for tensor in inputs]
