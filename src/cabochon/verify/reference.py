"""Our model beside transformers', on the same weights: what differs is a fault of ours.

Every module of ours is given what transformers' modules made, and what it makes of that is
compared. A difference is therefore its own, or of what the module around it computes before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cabochon.engine.request import Prompt
from cabochon.gemma4.model import Gemma4
from cabochon.nn.experts import Router
from cabochon.nn.weight import Weight
from cabochon.verify.against import ENDS, ends
from cabochon.verify.distance import distance
from cabochon.verify.halting import Call, Halting, Pair, paired
from cabochon.verify.stage import Finding, Progress, Table
from cabochon.verify.together import (
    Logits,
    Walked,
    added,
    logits_of,
    outcome,
    shares,
    spread,
)
from cabochon.verify.upstream import as_ours, inputs_of

SPREADS = 32.0  # times what modules differ from themselves, when rows are computed in two parts
NEAR = 8 * torch.finfo(torch.float32).eps  # so near that nobody need ask whose error it is
MOST = 10  # modules of a list
LOGITS = "logits"
WORST = ("module", "error")

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Departure:
    """How far one module is from transformers' on transformers' inputs; infinite if one is missing.

    Attributes:
        guilty: the module whose arithmetic makes the difference: this one, or the one around it.
        spread: of the module from itself, where that was measured.
    """

    name: str
    error: float
    guilty: str
    spread: float = 0.0


def against_transformers(
    theirs: Any, ours: Gemma4, prompts: Mapping[str, Prompt], progress: Progress | None = None
) -> Finding:
    """Both models on every prompt, module by module, and what comes out when nothing is given."""
    found: list[Departure] = []
    rows = []
    walked = Walked(ours, len(prompts), progress)
    for name, prompt in prompts.items():
        for made in departures(theirs, ours, prompt):
            if isinstance(made, Departure):
                found.append(made)
                walked(made.name)
            else:
                free = Logits(made, logits_of(ours, prompt))
                rows.append([name, *ends(free, prompt)])
    usual = max(departure.spread for departure in found)
    bound = SPREADS * max(usual, torch.finfo(torch.float32).eps)
    guilty: dict[str, Departure] = {}
    for departure in found:
        if departure.error > bound:
            known = guilty.setdefault(departure.guilty, departure)
            guilty[departure.guilty] = max(known, departure, key=lambda one: one.error)
    finding = Finding(f"{len({d.name for d in found})} modules on {len(prompts)} prompts")
    finding.faults = [_sentence(departure, bound) for departure in guilty.values()]
    finding.facts.append(
        f"modules differ from themselves by up to {usual:.1e}, in two parts; {bound:.1e} passes"
    )
    finding.tables["The modules that are furthest from transformers'"] = Table(
        WORST, [[one.name, f"{one.error:.2g}"] for one in _worst(found)]
    )
    finding.tables["What comes out"] = Table(ENDS, rows)
    finding.data = {
        "suspects": list(guilty),
        "bound": bound,
        "ends": [dict(zip(ENDS, row, strict=True)) for row in rows],
        "modules": [{"name": one.name, "error": _number(one.error)} for one in found],
    }
    return finding


@torch.inference_mode()
def departures(theirs: Any, ours: Gemma4, prompt: Prompt) -> Iterator[Departure | Tensor]:
    """Every module that either of them calls, in our order; then transformers' own logits."""
    measured: set[str] = set()
    with (
        Halting(theirs, lambda: theirs(**inputs_of(theirs, prompt), use_cache=False)) as first,
        Halting(ours, lambda: logits_of(ours, prompt)) as second,
    ):
        for pair in paired(first, second, _called(ours), lambda call: as_ours(call, ours)):
            yield from _departure(pair, measured)
        logits: Tensor = first.result.logits[0]
        yield Departure(LOGITS, distance(logits, second.result).relative, LOGITS)
    yield logits  # when nothing halts any more, and whoever asked may run the models himself


def _called(ours: Gemma4) -> frozenset[str]:
    """Modules that our model calls; of convolutions it takes the weights alone."""
    held = (Weight, nn.Conv1d, nn.Conv2d)
    return frozenset(n for n, module in ours.named_modules() if not isinstance(module, held))


def _departure(pair: Pair, measured: set[str]) -> Iterator[Departure]:
    name, theirs, ours = pair
    if theirs is None or ours is None:
        yield Departure(name, math.inf, name.rpartition(".")[0])
        return
    expected, found = outcome(theirs), outcome(ours)
    if isinstance(ours.module, Router):
        expected = shares(theirs.output, len(ours.module.per_expert_scale))
    if expected is None or found is None:
        return
    error = distance(expected, found).relative
    if expected.shape == found.shape:
        ours.instead = _copied(theirs.output)
    its_own = error < NEAR or not _innocent(ours.module, theirs, expected, error)
    guilty = name if its_own else name.rpartition(".")[0]
    yield Departure(name, error, guilty, _spread(ours.module, theirs, name, measured))


def _innocent(module: nn.Module, theirs: Call, expected: Tensor, error: float) -> bool:
    """Whether `module` would have made much less of its error of the inputs that it should get."""
    alone = added(module, theirs)
    return alone is not None and 2 * distance(expected, alone).relative < error


def _spread(module: nn.Module, theirs: Call, name: str, measured: set[str]) -> float:
    """Of one module of each kind. transformers' own has given its weights away by now."""
    kind = _NUMBER.sub("*", name)
    if kind in measured:
        return 0.0
    measured.add(kind)
    whole = added(module, theirs)
    return 0.0 if whole is None else spread(module, theirs.inputs, whole)


def _copied(output: Any) -> Any:
    """Of its own, for who made it may go on in place."""
    return tuple(map(_copied, output)) if isinstance(output, tuple) else output.clone()


def _worst(found: Sequence[Departure]) -> list[Departure]:
    """Each module once, on the prompt on which it is furthest."""
    worst: dict[str, Departure] = {}
    for one in found:
        worst[one.name] = max(worst.get(one.name, one), one, key=lambda it: it.error)
    return sorted(worst.values(), key=lambda one: one.error, reverse=True)[:MOST]


def _sentence(departure: Departure, bound: float) -> str:
    if math.isinf(departure.error):
        return f"{departure.guilty}: only one of the two calls {departure.name}, or in other sizes"
    where = "" if departure.name == departure.guilty else f", seen at {departure.name}"
    return (
        f"{departure.guilty}: differs from transformers' by {departure.error:.2g}{where}, where up"
        f" to {bound:.1e} is rounding"
    )


def _number(error: float) -> float | None:
    return error if math.isfinite(error) else None
