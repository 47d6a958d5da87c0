"""The verdict on one matrix: stored, claimed and needed give exactly one scheme, or a refusal.

The file decides whether and how a matrix is quantized. The configuration breaks ties, and what it
says beyond that becomes a note. Only a claim that this version could not honour refuses a file that
fits: numbers not computed as their producer computes them would be wrong in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cabochon.checkpoint.headers import TensorMeta
from cabochon.quant.activations import ACTIVATION_LEAVES
from cabochon.quant.byte_codes import ByteCodes
from cabochon.quant.claims import Claim
from cabochon.quant.families import FAMILIES
from cabochon.quant.gptq import Gptq
from cabochon.quant.packed_int import PackedInt
from cabochon.quant.scheme import (
    FLOATS,
    Activations,
    Dense,
    Difference,
    Scheme,
    Site,
    differences,
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why no scheme can be given to a site."""

    kind: Literal["SHAPE", "DTYPE", "SCHEME"]
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The scheme of a site, and what to tell the user about how it was chosen."""

    scheme: Scheme
    activations: Activations | None = None
    note: str | None = None


def resolve(site: Site, stored: Mapping[str, TensorMeta], claim: Claim) -> Verdict | Refusal:
    """The one scheme in which `stored` (leaf to tensor, at least one) is `site`."""
    candidates = _candidates(site, stored, claim)
    dense = any(isinstance(scheme, Dense) for scheme in candidates)
    # A row of a table is looked up, not multiplied with anything.
    activations = None if dense or site.kind == "embedding" else claim.activations
    fitting = [s for s in candidates if not differences(s, stored, site, activations)]
    if dense and fitting:
        return Verdict(fitting[0], note=_dense_note(claim))
    if claim.unsupported is not None:
        return Refusal("SCHEME", f"{claim.unsupported} ({claim.rule}); {_stored_as(stored)}")
    if claim.unrounded is not None and site.kind != "embedding":
        detail = f"{claim.unrounded} ({claim.rule}; --weights-only does without)"
        return Refusal("SCHEME", f"{detail}; {_stored_as(stored)}")
    for scheme in (claim.scheme, *claim.variants):
        if scheme in fitting:
            return Verdict(scheme, activations)
    if not fitting:
        return _nearest(site, stored, candidates, activations)
    fitting = _akin(fitting, claim.scheme)
    if len(fitting) > 1:
        names = " and ".join(scheme.name for scheme in fitting)
        return Refusal("SCHEME", f"its tensors fit {names}, and config.json does not say which")
    return _against_claim(fitting[0], activations, claim)


def _candidates(site: Site, stored: Mapping[str, TensorMeta], claim: Claim) -> list[Scheme]:
    """Schemes worth trying, likeliest first."""
    if set(stored) == {"weight"} and stored["weight"].dtype in FLOATS:
        return [Dense(stored["weight"].dtype)]
    found = {} if claim.scheme is None else dict.fromkeys((claim.scheme, *claim.variants))
    for family in FAMILIES:
        found |= dict.fromkeys(family.candidates(site, stored))
    weight = stored.get("weight")
    dtype = weight.dtype if weight is not None and weight.dtype in FLOATS else "BF16"
    return list(found) or [Dense(dtype)]


def _akin(fitting: list[Scheme], claimed: Scheme | None) -> list[Scheme]:
    """Those of the claimed layout, if there are any.

    Producers may store the same numbers alike, and a claim of the one is no claim of the other. Of
    GPTQ's versions a whole file has one; of its order of columns, nothing but `g_idx` tells.
    """
    same = [s for s in fitting if type(s) is type(claimed)]
    if isinstance(claimed, Gptq):
        alike = [s for s in same if isinstance(s, Gptq) and s.version == claimed.version]
        same = [s for s in alike if s.ordered or not claimed.ordered]
    return same or fitting


def _dense_note(claim: Claim) -> str | None:
    if claim.dense or not claim.selective:
        return None
    said = f" says {claim.scheme.name}" if claim.scheme is not None else f": {claim.unsupported}"
    return f"{claim.rule}{said}; the file stores it dense: loaded dense"


def _against_claim(
    scheme: Scheme, activations: Activations | None, claim: Claim
) -> Verdict | Refusal:
    """`scheme` alone fits, but it is not what the configuration claims."""
    if claim.deferred:
        return Verdict(scheme, activations)
    said = "nothing" if claim.scheme is None else claim.scheme.name
    if _lacks_zero_points(scheme, claim.scheme):
        return Refusal("SCHEME", f"{claim.rule} says {said}, but weight_zero_point is missing")
    note = f"{claim.rule} says {said}, the tensors are {scheme.name}: loaded so"
    return Verdict(scheme, activations, note)


def _lacks_zero_points(scheme: Scheme, claimed: Scheme | None) -> bool:
    kinds = (PackedInt, ByteCodes)
    return (
        isinstance(scheme, kinds)
        and isinstance(claimed, kinds)
        and scheme.symmetric
        and not claimed.symmetric
    )


def _distance(differing: tuple[Scheme, Sequence[Difference]]) -> tuple[int, int]:
    """How many differences, and how many of them are tensors of which the scheme knows nothing."""
    kinds = [difference.kind for difference in differing[1]]
    return len(kinds), kinds.count("UNUSED")


def _nearest(
    site: Site,
    stored: Mapping[str, TensorMeta],
    candidates: Sequence[Scheme],
    activations: Activations | None,
) -> Refusal:
    unclaimed = min(stored.keys() & ACTIVATION_LEAVES, default=None)
    if unclaimed is not None and activations is None:
        detail = f"{unclaimed} rounds activations, and config.json does not say how"
        return Refusal("SCHEME", f"{detail} (--weights-only ignores it); {_stored_as(stored)}")
    differing = [(s, differences(s, stored, site, activations)) for s in candidates]
    nearest, found = min(differing, key=_distance)
    kinds = {difference.kind for difference in found}
    text = "; ".join(difference.text for difference in found)
    if kinds == {"SHAPE"}:
        return Refusal("SHAPE", text)
    if kinds == {"DTYPE"}:
        return Refusal("DTYPE", text)
    if activations is not None and not differences(nearest, stored, site):
        text += " (--weights-only does without)"
    return Refusal("SCHEME", f"nearest is {nearest.name}: {text}")


def _stored_as(stored: Mapping[str, TensorMeta]) -> str:
    return "stored as " + ", ".join(f"{leaf} {stored[leaf].dtype}" for leaf in sorted(stored))
