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
from cabochon.quant.claims import Claim
from cabochon.quant.nvfp4 import Nvfp4
from cabochon.quant.scheme import FLOATS, Dense, PackedInt, Scheme, Site, differences

# Leaves that give another format away, so that a refusal can name it.
_FOREIGN = (
    ("weight_g_idx", "activation reordering (actorder group)"),
    ("weight.absmax", "bitsandbytes 4-bit"),
    ("SCB", "bitsandbytes LLM.int8"),
    ("qweight", "GPTQ or AWQ"),
    ("weight_scale_inv", "block-wise fp8"),
    ("input_global_scale", "NVFP4 with quantized activations (compressed-tensors)"),
    ("input_scale", "a fixed scale of activations, which are then quantized too,"),
    ("pre_quant_scale", "AWQ smoothing of activations (ModelOpt)"),
    ("scales", "MLX"),
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
    note: str | None = None


def resolve(site: Site, stored: Mapping[str, TensorMeta], claim: Claim) -> Verdict | Refusal:
    """The one scheme in which `stored` (leaf to tensor, at least one) is `site`."""
    candidates = _candidates(site, stored, claim)
    fitting = [scheme for scheme in candidates if not differences(scheme, stored, site)]
    if any(isinstance(scheme, Dense) for scheme in fitting):
        return Verdict(fitting[0], _dense_note(claim))
    if claim.unsupported is not None:
        return Refusal("SCHEME", f"{claim.unsupported} ({claim.rule}); {_stored_as(stored)}")
    if claim.scheme in fitting:
        return Verdict(claim.scheme)
    if not fitting:
        return _nearest(site, stored, candidates)
    if len(fitting) > 1:
        names = " and ".join(scheme.name for scheme in fitting)
        return Refusal("SCHEME", f"its tensors fit {names}, and config.json does not say which")
    return _against_claim(fitting[0], claim)


def _candidates(site: Site, stored: Mapping[str, TensorMeta], claim: Claim) -> list[Scheme]:
    """Schemes worth trying, likeliest first. They are told apart by dtypes, widths and leaves."""
    weight = stored.get("weight")
    if weight is not None and weight.dtype in FLOATS:
        return [Dense(weight.dtype)]
    found: dict[Scheme, None] = {}
    if claim.scheme is not None:
        found[claim.scheme] = None
    if "weight_global_scale" in stored:
        found[Nvfp4("compressed-tensors")] = None
    elif "weight_scale_2" in stored:
        found[Nvfp4("modelopt")] = None
    elif "weight_packed" in stored or "weight_scale" in stored:
        symmetric = "weight_zero_point" not in stored
        for bits in (4, 8):
            for group in _groups(site, stored.get("weight_scale")):
                found[PackedInt(bits, group, symmetric)] = None
    return list(found) or [Dense("BF16")]


def _groups(site: Site, scale: TensorMeta | None) -> list[int | None]:
    """Group sizes that give as many groups as `scale` has: powers of two, and an even split."""
    count = scale.shape[-1] if scale is not None and scale.shape else 1
    if count <= 1:
        return [None]
    sizes = {2**n for n in range(3, 13) if -(-site.in_features // 2**n) == count}
    if site.in_features % count == 0:
        sizes.add(site.in_features // count)
    return sorted(sizes) or [None]


def _dense_note(claim: Claim) -> str | None:
    if claim.dense:
        return None
    said = f" says {claim.scheme.name}" if claim.scheme is not None else f": {claim.unsupported}"
    return f"{claim.rule}{said}; the file stores it dense: loaded dense"


def _against_claim(scheme: Scheme, claim: Claim) -> Verdict | Refusal:
    """`scheme` alone fits, but it is not what the configuration claims."""
    said = "nothing" if claim.scheme is None else claim.scheme.name
    if _lacks_zero_points(scheme, claim.scheme):
        return Refusal("SCHEME", f"{claim.rule} says {said}, but weight_zero_point is missing")
    return Verdict(scheme, f"{claim.rule} says {said}, the tensors are {scheme.name}: loaded so")


def _lacks_zero_points(scheme: Scheme, claimed: Scheme | None) -> bool:
    return (
        isinstance(scheme, PackedInt)
        and isinstance(claimed, PackedInt)
        and scheme.symmetric
        and not claimed.symmetric
    )


def _nearest(site: Site, stored: Mapping[str, TensorMeta], candidates: Sequence[Scheme]) -> Refusal:
    foreign = next((name for leaf, name in _FOREIGN if leaf in stored), None)
    if foreign is not None:
        detail = f"{foreign} is not supported by this version; {_stored_as(stored)}"
        return Refusal("SCHEME", detail)
    nearest = min(candidates, key=lambda scheme: len(differences(scheme, stored, site)))
    found = differences(nearest, stored, site)
    kinds = {difference.kind for difference in found}
    text = "; ".join(difference.text for difference in found)
    if kinds == {"SHAPE"}:
        return Refusal("SHAPE", text)
    if kinds == {"DTYPE"}:
        return Refusal("DTYPE", text)
    return Refusal("SCHEME", f"nearest is {nearest.name}: {text}")


def _stored_as(stored: Mapping[str, TensorMeta]) -> str:
    return "stored as " + ", ".join(f"{leaf} {stored[leaf].dtype}" for leaf in sorted(stored))
