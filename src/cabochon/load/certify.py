"""The certificate of a load that keeps nothing: every byte is read and looked at once."""

from __future__ import annotations

import torch

from cabochon.load.certificate import Certificate
from cabochon.load.execute import Progress, blank, build_weight, check_bounds, fill_parameter
from cabochon.load.measure import Measure
from cabochon.load.plan import LoadPlan


def certify(
    plan: LoadPlan, *, thorough: bool = False, progress: Progress | None = None
) -> Certificate:
    """What `execute` would certify of `plan`, with one matrix in memory at a time.

    Raises:
        UnreadableError: a file ended early.
        LoadError: a value cannot be right; the text names the tensor.
    """
    model, measure, done = blank(plan), Measure(thorough=thorough), 0
    for site in plan.sites:
        build_weight(site, torch.float32, measure)
        done += site.nbytes
        if progress is not None:
            progress(done, plan.nbytes)
    for parameter in plan.parameters:
        fill_parameter(model, parameter, torch.float32, measure)
    check_bounds(model)
    sites = {read.site.name for read in plan.sites}
    return measure.certificate(plan, len(sites) + len(plan.parameters))
