"""Looks at weights as they are read, and makes the certificate of a load of what it saw."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from cabochon.checkpoint.headers import TensorMeta
from cabochon.load.certificate import FAR, Certificate, SiteStatistics, join
from cabochon.load.fingerprint import plan_hash
from cabochon.load.kv_scales import read_kv_scales
from cabochon.load.look import Look, Scales, level_of, look, scales_of
from cabochon.load.looked import Looked
from cabochon.load.plan import LoadPlan, SiteRead
from cabochon.nn.found import NOTHING
from cabochon.nn.packed_int import PackedIntWeight
from cabochon.nn.weight import DenseWeight, Weight
from cabochon.quant.gptq import Gptq

# Of a quantized matrix that are looked at, unless all are: runs of rows, and entries of a run. One
# thread turns so few into floats. Waking others, as indexing by a tensor would, takes a third of a
# load: they look out for more to do for milliseconds, where other threads could compute.
_RUNS, _FEW = 4, 1 << 14
_ENTRIES = 1 << 20  # turned into floats at a time

_SCALES = {"scales", "float8 scales", "blocks"}  # slots that hold all scales of a matrix
# Values of a tower's standardization that change nothing; it begins with them.
_IDLE = {"std_bias": 0.0, "std_scale": 1.0}
# What slots hold that is neither the matrix nor its codes, and multiplies or is added.
_NUMBERS = {"scales", "float8 scales", "scale", "scale or none", "divisor", "factor"}


class Measure:
    """Collects statistics and hashes, matrix by matrix.

    Args:
        thorough: look at every entry of quantized matrices too. A sample of rows takes no time; all
            of them take about as long as one token does without any kernel.
        look: what looks at stored bytes.
    """

    def __init__(self, *, thorough: bool = False, look: Look = look) -> None:
        self._thorough = thorough
        self._look = look
        self._sites: dict[str, list[SiteStatistics]] = {}
        self._hashes: dict[tuple[str, int], bytes] = {}  # rows of one tensor may be apart
        self._untrained: list[str] = []

    def tensor(self, tensor: Tensor, meta: TensorMeta, kind: str = NOTHING) -> Looked:
        """What is in a stored tensor, looked at as that kind."""
        looked = self._look(tensor, meta, kind)
        self._hashes[meta.name, meta.span[0]] = looked.digest
        return looked

    def parameter(self, name: str, values: Tensor) -> None:
        """A parameter as it was read."""
        idle = _IDLE.get(name.rpartition(".")[2])
        if idle is not None and bool((values == idle).all()):
            self._untrained.append(name)

    def site(
        self,
        read: SiteRead,
        stored: Mapping[str, Tensor],
        looked: Mapping[str, Looked],
        weight: Weight,
    ) -> None:
        """A matrix or a part of one: what is stored of it, what was seen there, what it became."""
        site = read.site
        if isinstance(weight, DenseWeight):
            whole = looked["weight"]
            seen, most, none = whole.count, whole.largest, whole.zeros
        else:
            seen, most, none = self._entries(weight)
        scales = _scales(read, stored, looked)
        coded = _with_zero_points(weight)
        statistics = SiteStatistics(
            name=site.name,
            scheme=read.stored_as,
            entries=site.out_features * site.in_features,
            seen=seen,
            largest=most,
            zeros=none,
            scales=scales.count,
            dead_groups=scales.dead,
            largest_scale=scales.largest,
            median_scale=scales.median,
            far_scales=scales.largest > FAR * scales.median > 0,
            levels=_levels(read, stored),
            shifted_zeros=coded is not None and _shifted(coded),
            unclaimed_zeros=coded is not None and _claimed_symmetric(read),
            offset=0.0 if coded is None else _offset(coded),
        )
        self._sites.setdefault(site.name, []).append(statistics)

    def certificate(self, plan: LoadPlan, filled: int) -> Certificate:
        """Of the load of `plan`, after which so many matrices and parameters are filled."""
        bytes_hash = hashlib.sha256()
        for (name, _), digest in sorted(self._hashes.items()):
            bytes_hash.update(hashlib.sha256(name.encode()).digest() + digest)
        return Certificate(
            plan_hash=plan_hash(plan),
            weights_hash=bytes_hash.hexdigest(),
            planned=len({read.site.name for read in plan.sites}) + len(plan.parameters),
            filled=filled,
            nbytes=plan.nbytes,
            sites=tuple(join(self._sites)),
            kv_scales=read_kv_scales(plan),
            untrained=tuple(self._untrained),
        )

    def _entries(self, weight: Weight) -> tuple[int, float, int]:
        """How many entries were looked at, their largest magnitude, and how many are zero."""
        rows, width = weight.out_features, weight.in_features
        step = max(1, (_ENTRIES if self._thorough else _FEW) // width)
        starts = range(0, rows, step if self._thorough else max(step, rows // _RUNS))
        seen, most, none = 0, 0.0, 0
        for start in starts:
            tile = weight.dense(torch.float32, start, min(start + step, rows))
            seen += tile.numel()
            most = max(most, float(tile.abs().max()))
            none += tile.numel() - int(tile.count_nonzero())
        return seen, most, none


def _scales(read: SiteRead, stored: Mapping[str, Tensor], looked: Mapping[str, Looked]) -> Scales:
    """Those of a matrix, or of a part of one; none of what is stored as floats."""
    for slot in read.scheme.slots:
        if slot.leaf in stored and slot.holds in _SCALES:
            return scales_of(stored[slot.leaf], looked[slot.leaf])
    return Scales(0, 0, 0.0, 0.0)


def _with_zero_points(weight: Weight) -> PackedIntWeight | None:
    coded = (part for part in weight.modules() if isinstance(part, PackedIntWeight))
    return next((part for part in coded if part.zeros is not None), None)


def _claimed_symmetric(read: SiteRead) -> bool:
    """GPTQ's layout stores zero points all the same; those of symmetric codes are not kept."""
    return isinstance(read.scheme, Gptq) and read.scheme.symmetric


def _shifted(weight: PackedIntWeight) -> bool:
    """Whether all zero points are the same, and one more or less than the middle of the codes."""
    assert weight.zeros is not None
    first = int(weight.zeros.flatten()[0])
    beside = abs(first - (1 << (weight.bits - 1))) == 1
    return beside and bool((weight.zeros == first).all())


def _offset(weight: PackedIntWeight) -> float:
    """How far codes are from their zero points, on average of a few rows, in steps."""
    assert weight.zeros is not None
    some = slice(None, None, max(1, weight.out_features * weight.in_features // _FEW))
    steps = PackedIntWeight(
        weight.words[some],
        torch.ones_like(weight.scales[some]),
        weight.zeros[some],
        in_features=weight.in_features,
        bits=weight.bits,
        group=weight.group,
    )
    return float(steps.dense(torch.float32).mean())


def _levels(read: SiteRead, stored: Mapping[str, Tensor]) -> dict[str, float]:
    """How large the numbers are that go with a matrix, by the leaf that holds them."""
    return {
        slot.leaf: level_of(stored[slot.leaf])
        for slot in read.slots
        if slot.leaf in stored and slot.holds in _NUMBERS
    }
