"""Carrying out a load plan, matrix by matrix in the order of the files and never two at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cabochon.checkpoint.folder import read_tensor
from cabochon.checkpoint.mapped import map_tensor, pieces
from cabochon.errors import LoadError
from cabochon.gemma4.drafter import Drafter
from cabochon.gemma4.model import Gemma4
from cabochon.load.certificate import Certificate
from cabochon.load.look import Look, look
from cabochon.load.looked import Looked, kind_of, kind_of_parameter
from cabochon.load.measure import Measure
from cabochon.load.plan import LoadPlan, ParameterRead, SiteRead
from cabochon.load.transforms import CHANGES, transform
from cabochon.load.values import check_finite, check_looked, check_order, check_value, is_finite
from cabochon.nn.clippable import ClippableLinear
from cabochon.nn.linear import Embedding, Linear
from cabochon.nn.weight import Stack, Weight

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Prepare = Callable[[Weight, bool], Weight]


Model = Gemma4 | Drafter


class Loaded(NamedTuple):
    model: Model
    certificate: Certificate


def execute(
    plan: LoadPlan,
    *,
    dtype: torch.dtype,
    progress: Progress | None = None,
    thorough: bool = False,
    look: Look = look,
    prepare: Prepare | None = None,
) -> Loaded:
    """The model that `plan`, which has no problems, describes, and what was seen on the way.

    Matrices stay in their stored bits; norms, scalars and clip bounds are held in float32.

    Args:
        plan: which bytes become what.
        dtype: what activations will be computed in. Everything stored as floats must be finite in
            it.
        progress: called with bytes done and bytes in all.
        thorough: look at every entry for the certificate, not at a sample of quantized matrices.
        look: what looks at stored bytes.
        prepare: called with each weight that is multiplied with, as soon as it is built, and
            whether logits are made with it; what it returns takes the weight's place.

    Raises:
        UnreadableError: a file ended early.
        LoadError: a value cannot be right; the text names the tensor.
    """
    model = blank(plan)
    measure = Measure(thorough=thorough, look=look)
    reads: list[SiteRead | ParameterRead] = [*plan.sites, *plan.parameters]
    done, total = 0, plan.nbytes
    parts: dict[str, dict[int, Weight]] = {}
    for read in sorted(reads, key=_position):
        if isinstance(read, SiteRead):
            weight = build_weight(read, dtype, measure)
            if prepare is not None and _multiplied(read, plan):
                weight = prepare(weight, _is_head(read, plan) and _makes_all_logits(plan))
            if read.part is None:
                fill_site(model, read.site.name, weight)
            else:
                parts.setdefault(read.site.name, {})[read.part] = weight
            done += read.nbytes
        else:
            fill_parameter(model, read, dtype, measure)
            done += read.tensor.nbytes
        if progress is not None:
            progress(done, total)
    for name, stored in parts.items():
        fill_site(model, name, Stack([stored[part] for part in sorted(stored)]))
    check_bounds(model)
    return Loaded(model.eval(), measure.certificate(plan, _filled(model, plan)))


def blank(plan: LoadPlan) -> Model:
    """The model that `plan`, which has no problems, describes, without a weight."""
    assert not plan.problems
    kind = Gemma4 if plan.config.drafting is None else Drafter
    with torch.device("meta"):
        model: Model = kind(plan.config, has_head=plan.has_head)
    _assert_same(model, plan)
    return model


def _multiplied(read: SiteRead, plan: LoadPlan) -> bool:
    """Of a table that is no head, only rows are looked up."""
    return read.site.kind != "embedding" or _is_head(read, plan)


def _is_head(read: SiteRead, plan: LoadPlan) -> bool:
    return read.site.name.endswith("lm_head" if plan.has_head else ".embed_tokens")


def _makes_all_logits(plan: LoadPlan) -> bool:
    """A drafter with clusters of tokens makes those of a few."""
    return plan.config.drafting is None or plan.config.drafting.clusters is None


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _assert_same(model: Model, plan: LoadPlan) -> None:
    """The plan was made from `load.tree`; it must be of the model that was built."""
    modules = dict(model.named_modules())
    built = {name for name, module in modules.items() if isinstance(module, Linear | Embedding)}
    planned = {read.site.name for read in plan.sites}
    assert built == planned, sorted(built ^ planned)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model)}
    wanted = {read.parameter.name: read.parameter.shape for read in plan.parameters}
    assert shapes == wanted, sorted(shapes.items() ^ wanted.items())


def _filled(model: Model, plan: LoadPlan) -> int:
    """How many matrices and parameters there are, none of which may be empty."""
    parameters = dict(tensors_of(model))
    for name, tensor in parameters.items():
        assert not tensor.is_meta, name
    sites = {n: m for n, m in model.named_modules() if isinstance(m, Linear | Embedding)}
    for name, module in sites.items():
        assert module.weight is not None, name
    return len(sites) + sum(read.parameter.name in parameters for read in plan.parameters)


def _position(read: SiteRead | ParameterRead) -> tuple[str, int]:
    metas = read.stored.values() if isinstance(read, SiteRead) else (read.tensor,)
    return min((str(meta.file), meta.span[0]) for meta in metas)


def fill_site(model: Model, name: str, weight: Weight) -> None:
    module = model.get_submodule(name)
    assert isinstance(module, Linear | Embedding)
    module.weight = weight


def build_weight(read: SiteRead, dtype: torch.dtype, measure: Measure | None = None) -> Weight:
    """The matrix, or the part of one, that `read` describes; `measure` sees it on the way.

    Raises:
        UnreadableError: a file ended early.
        LoadError: a value cannot be right; the text names the tensor.
    """
    tensors = {leaf: map_tensor(meta) for leaf, meta in read.stored.items()}
    see = look if measure is None else measure.tensor
    looked: dict[str, Looked] = {}
    for slot in (slot for slot in read.slots if slot.leaf in tensors):
        meta, tensor = read.stored[slot.leaf], tensors[slot.leaf]
        seen = see(tensor, meta, kind_of(slot, meta))
        check_looked(slot, seen, pieces(tensor, meta), meta, dtype)
        check_value(slot, tensor, meta, read.site)
        looked[slot.leaf] = seen
        if slot.holds == "float8 scales":
            tensors[slot.leaf] = tensor.view(torch.float8_e4m3fn)
    assert looked.keys() == tensors.keys()  # what is not hashed is not certified
    if read.transform is not None:
        shape = read.stored["weight"].shape
        tensors["weight"] = transform(tensors["weight"], read.transform, shape)
    weight = read.scheme.build(tensors, read.site)
    if measure is not None:
        measure.site(read, tensors, looked, weight)
    return weight if read.activations is None else read.activations.around(weight, tensors)


def fill_parameter(model: Model, read: ParameterRead, dtype: torch.dtype, measure: Measure) -> None:
    tensor, kind = read_tensor(read.tensor), kind_of_parameter(read.tensor)
    seen = measure.tensor(tensor, read.tensor, kind)
    tensor = tensor.long() if read.parameter.order else tensor.float()
    if read.transform is not None:
        tensor = transform(tensor, read.transform, read.parameter.shape)
    if read.parameter.order:
        check_order(tensor, read.tensor)
    elif not read.parameter.bound:
        if read.transform in CHANGES or not (kind and is_finite(seen.largest, dtype)):
            check_finite(tensor, read.tensor, dtype)
    elif tensor.isnan().any():
        raise LoadError(f"{read.tensor.file}: clip bound {read.tensor.name!r} is not a number")
    measure.parameter(read.parameter.name, tensor)
    path, _, leaf = read.parameter.name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(module, leaf, tensor)


def check_bounds(model: Model) -> None:
    """`LoadError` if a layer of a tower would let nothing through between its bounds."""
    for name, module in model.named_modules():
        if not isinstance(module, ClippableLinear) or not module.clipped:
            continue
        for end in ("input", "output"):
            low, high = getattr(module, f"{end}_min"), getattr(module, f"{end}_max")
            if low > high:
                raise LoadError(
                    f"{name}.{end}_min is {float(low):g}, above {end}_max, which is"
                    f" {float(high):g}: all that is clipped to them would be one number"
                )
