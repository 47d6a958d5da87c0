"""A checkpoint against its original: weights, then every module, then what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.engine.request import Prompt
from cabochon.gemma4.model import Gemma4
from cabochon.load.groups import group_of
from cabochon.load.plan import LoadPlan, SiteRead
from cabochon.nn.weight import TILE_BYTES
from cabochon.verify.chart import scatter
from cabochon.verify.stage import Finding, Progress, Table
from cabochon.verify.suspects import Suspect, suspicious_modules, suspicious_weights
from cabochon.verify.together import Logits, ModuleError, Walked, together
from cabochon.verify.weights import SiteSigns, compare

MOST = 10  # modules of a list
WORST = ("module", "error added", "error reached", "cosine")


def weights_against(original: LoadPlan, plan: LoadPlan, progress: Progress | None) -> Finding:
    """Every matrix against the original's; no model is run."""
    sites = list(compare(original, plan, progress))
    suspects = suspicious_weights(sites, _bits(plan))
    lossy = [s for s in sites if s.loss is not None and s.loss.distance.relative > 0]
    finding = Finding(
        f"{len(sites)} matrices, {len(lossy)} of them changed",
        faults=_sentences(suspects),
        data={"suspects": [suspect.name for suspect in suspects]},
    )
    finding.tables["Loss by kind"] = Table(
        ("group", "stored as", "bits", "matrices", "least dB", "mean dB"), list(_kinds(lossy))
    )
    if lossy:
        caption = "Bits that a matrix takes for each entry, and what it lost: bits against damage."
        finding.figures.append((scatter(_damage(lossy), "bits", "dB"), caption))
    return finding


@dataclass(frozen=True, slots=True)
class Models:
    """Two models and the plan of the second, whose sites bear the names of modules."""

    original: Gemma4
    found: Gemma4
    plan: LoadPlan


def modules_against(
    models: Models, prompts: Mapping[str, Prompt], progress: Progress | None = None
) -> Finding:
    """Both models side by side on every prompt, module by module."""
    finding = Finding("")
    runs: list[list[ModuleError]] = []
    rows = []
    walked = Walked(models.found, len(prompts), progress)
    for name, prompt in prompts.items():
        runs.append([])
        for step in together(models.original, models.found, prompt):
            if isinstance(step, Logits):
                rows.append([name, *ends(step, prompt)])
            else:
                runs[-1].append(step)
                walked(step.name)
    errors = [error for run in runs for error in run]
    suspects = suspicious_modules(runs, _stored(models.plan), _bits(models.plan))
    first = next((e for e in errors if e.name in {s.name for s in suspects}), None)
    finding.faults = _sentences(suspects)
    if first is not None:
        finding.faults.insert(0, f"the first to depart is {first.name}")
    spread = max(error.spread for error in errors)
    finding.summary = f"{len({e.name for e in errors})} modules on {len(prompts)} prompts"
    finding.facts.append(f"the original differs from itself by at most {spread:.1e}, in two parts")
    finding.tables["What comes out"] = Table(ENDS, rows)
    finding.tables["The modules that add most"] = Table(WORST, [_worst(e) for e in _top(errors)])
    caption = "What each module adds to the error, given the original's inputs, along depth."
    along = _depth(errors, _added)
    finding.figures.append((scatter(along, "layer", "error added", log=True), caption))
    caption = "How far each module has come from the original by then, on its own model's inputs."
    along = _depth(errors, lambda error: error.reached.relative)
    finding.figures.append((scatter(along, "layer", "error reached", log=True), caption))
    finding.data = {
        "suspects": [suspect.name for suspect in suspects],
        "first": None if first is None else first.name,
        "ends": [dict(zip(ENDS, row, strict=True)) for row in rows],
        "modules": [_as_dict(error) for error in errors],
    }
    return finding


ENDS = ("prompt", "KL divergence", "top 1 agrees", "top 5 agree", "perplexity", "original's")


def ends(logits: Logits, prompt: Prompt) -> list[str]:
    """Means over positions: the divergence of `found` from the original, in nats, and the rest."""
    following = torch.tensor([*prompt.tokens[1:], 0])
    sums = torch.zeros(5, dtype=torch.float64)
    rows = max(1, TILE_BYTES // (8 * logits.found.shape[1]))
    for start in range(0, len(following), rows):
        some = slice(start, start + rows)
        p = logits.original[some].double().log_softmax(-1)
        q = logits.found[some].double().log_softmax(-1)
        sums[0] += (p.exp() * (p - q)).sum()
        sums[1] += (p.argmax(-1) == q.argmax(-1)).sum()
        five = [set(a) & set(b) for a, b in zip(_five(p), _five(q), strict=True)]
        sums[2] += sum(map(len, five)) / 5
        read = following[some, None][: len(following) - 1 - start]  # what follows the last is open
        sums[3] -= q[: len(read)].gather(1, read).sum()
        sums[4] -= p[: len(read)].gather(1, read).sum()
    divergence, first, five_alike = (sums[:3] / len(following)).tolist()
    both = (sums[3:] / (len(following) - 1)).exp().tolist()
    return [f"{divergence:.3g}", f"{first:.1%}", f"{five_alike:.1%}", *(f"{v:.2f}" for v in both)]


def _five(logits: Tensor) -> list[list[int]]:
    found: list[list[int]] = logits.topk(5, dim=-1).indices.tolist()
    return found


def _stored(plan: LoadPlan) -> Mapping[str, str]:
    found: dict[str, dict[str, None]] = {}
    for name, read in _modules(plan):
        found.setdefault(name, {})[read.stored_as] = None
    return {name: " and ".join(schemes) for name, schemes in found.items()}


def _bits(plan: LoadPlan) -> Mapping[str, int]:
    found: dict[str, int] = {}
    for name, read in _modules(plan):
        found[name] = min(read.scheme.bits, found.get(name, read.scheme.bits))
    return found


def _modules(plan: LoadPlan) -> Iterator[tuple[str, SiteRead]]:
    """The matrices that each module computes with; experts are one module, of two matrices."""
    for read in plan.sites:
        yield read.site.name, read
        if read.site.kind == "experts":
            yield read.site.name.rpartition(".")[0], read


def _sentences(suspects: Sequence[Suspect]) -> list[str]:
    return [f"{suspect.name}: {suspect.reason}" for suspect in suspects]


def _kinds(sites: Sequence[SiteSigns]) -> Iterator[list[str]]:
    groups: dict[tuple[str, str], list[SiteSigns]] = {}
    for site in sites:
        groups.setdefault((group_of(site.name), site.stored_as), []).append(site)
    for (group, stored), found in groups.items():
        decibels = [site.loss.distance.decibels for site in found if site.loss is not None]
        bits = sum(site.signs.bits for site in found) / len(found)
        mean = sum(decibels) / len(decibels)
        yield [group, stored, f"{bits:.2f}", str(len(found)), f"{min(decibels):.1f}", f"{mean:.1f}"]


def _damage(sites: Sequence[SiteSigns]) -> Mapping[str, list[tuple[float, float, str]]]:
    series: dict[str, list[tuple[float, float, str]]] = {}
    for site in sites:
        assert site.loss is not None
        point = (site.signs.bits, site.loss.distance.decibels, site.name)
        series.setdefault(group_of(site.name), []).append(point)
    return series


def _depth(
    errors: Iterable[ModuleError], value: Callable[[ModuleError], float]
) -> Mapping[str, list[tuple[float, float, str]]]:
    """By the last name of a module: all q_proj are one series."""
    series: dict[str, list[tuple[float, float, str]]] = {}
    for error in errors:
        number = next((int(part) for part in error.name.split(".") if part.isdecimal()), None)
        if number is not None and error.added is not None and value(error) > 0:
            kind = error.name.rpartition(".")[2]
            point = (number, value(error), f"{error.name}, {value(error):.2g}")
            series.setdefault(kind, []).append(point)
    return series


def _top(errors: Sequence[ModuleError]) -> list[ModuleError]:
    worst: dict[str, ModuleError] = {}
    for error in errors:
        if error.added is not None and (
            error.name not in worst or _added(worst[error.name]) < _added(error)
        ):
            worst[error.name] = error
    return sorted(worst.values(), key=_added, reverse=True)[:MOST]


def _added(error: ModuleError) -> float:
    return error.added.relative if error.added is not None else 0.0


def _worst(error: ModuleError) -> list[str]:
    added = f"{_added(error):.3g}"
    return [error.name, added, f"{error.reached.relative:.3g}", f"{error.reached.cosine:.6f}"]


def _as_dict(error: ModuleError) -> dict[str, object]:
    return {
        "name": error.name,
        "relative": error.reached.relative,
        "cosine": error.reached.cosine,
        "added": None if error.added is None else error.added.relative,
        "spread": error.spread,
    }
