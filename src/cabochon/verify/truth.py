"""Whether kernels tell the truth: what runs fast against `dense()` in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.kernels.choose import Kernels
from cabochon.kernels.library import Activations
from cabochon.load.execute import build_weight
from cabochon.load.plan import LoadPlan, SiteRead
from cabochon.nn.weight import Weight
from cabochon.verify.stage import Finding, Table

SAMPLED = 3  # matrices of each scheme
MOST_ROWS = 4096  # of a matrix that are looked at
# Errors, in norms of the result, that rounding the inputs so explains.
BOUNDS: dict[Activations, float] = {"float32": 1e-5, "int16": 1e-3, "int8": 3e-2}
COLUMNS = ("scheme", "kernel", "inputs", "median error", "largest error", "bound")


@dataclass(frozen=True, slots=True)
class Trial:
    """One sampled matrix, its kernel, and relative errors for several inputs."""

    name: str
    scheme: str
    kernel: str
    errors: tuple[float, ...]


def kernels_tell_the_truth(plan: LoadPlan, kernels: Kernels) -> Finding:
    """Compare the path that serving takes with exact products, for samples of every scheme."""
    trials = list(_trials(plan, kernels))
    bound = BOUNDS[kernels.activations]
    wrong = [trial for trial in trials if not max(trial.errors) < bound]
    schemes = sorted({trial.scheme for trial in trials})
    rows = [_row([t for t in trials if t.scheme == scheme], bound) for scheme in schemes]
    return Finding(
        f"{len(trials)} sampled matrices in {len(schemes)} schemes, activations"
        f" {kernels.activations}",
        faults=[
            f"{t.name} ({t.scheme}, {t.kernel}): relative error {max(t.errors):.2g}, the bound is"
            f" {bound:g}"
            for t in wrong
        ],
        tables={"Errors against float64": Table(COLUMNS, rows)},
        data={
            "bound": bound,
            "trials": [
                {"name": t.name, "scheme": t.scheme, "kernel": t.kernel, "errors": t.errors}
                for t in trials
            ],
        },
    )


def _trials(plan: LoadPlan, kernels: Kernels) -> Iterator[Trial]:
    for scheme, reads in _sampled(plan):
        for read in reads:
            weight = build_weight(read, torch.float32)
            rows = min(weight.out_features, MOST_ROWS)
            exact = weight.dense(torch.float32, 0, rows).double()
            kernel = kernels.for_weight(weight)
            errors = tuple(_error(kernel, exact, x) for x in _inputs(weight.in_features))
            name = "PyTorch" if kernel is weight else type(kernel).__name__
            yield Trial(read.site.name, scheme, name, errors)


def _sampled(plan: LoadPlan) -> Iterator[tuple[str, Sequence[SiteRead]]]:
    """First, middle and last of the matrices of each scheme; tables are looked up, not tried."""
    schemes: dict[str, list[SiteRead]] = {}
    for read in plan.sites:
        if read.site.kind != "embedding" and read.activations is None:
            schemes.setdefault(read.stored_as, []).append(read)
    for scheme, reads in schemes.items():
        picked = {0, len(reads) // 2, len(reads) - 1}
        yield scheme, [reads[index] for index in sorted(picked)]


def _inputs(width: int) -> Iterator[Tensor]:
    """One row and several, ordinary and with outliers as activations of language models have."""
    chance = torch.Generator().manual_seed(0)
    for rows in (1, 5):
        ordinary = torch.randn(rows, width, generator=chance)
        yield ordinary
        heavy = ordinary.clone()
        heavy[:, :: max(1, width // 4)] *= 30
        yield heavy


def _error(kernel: Weight, exact: Tensor, x: Tensor) -> float:
    expected = x.double() @ exact.T
    found = kernel.linear(x)[..., : len(exact)].double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def _row(trials: Sequence[Trial], bound: float) -> list[str]:
    errors = torch.tensor([error for trial in trials for error in trial.errors])
    kernels = ", ".join(sorted({trial.kernel for trial in trials}))
    return [
        trials[0].scheme,
        kernels,
        str(len(errors)),
        f"{errors.median():.2g}",
        f"{errors.max():.2g}",
        f"{bound:g}",
    ]
