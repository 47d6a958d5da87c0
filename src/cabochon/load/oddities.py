"""What headers may say and hardly ever mean: noted, since only their maker knows.

Those of GGUF files are none of these: their makers choose the type of each tensor for itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cabochon.checkpoint.headers import TensorMeta

if TYPE_CHECKING:
    from cabochon.load.plan import SiteRead

FEW = 4  # of a kind are too few to call one of them odd

_HALVES = {"F16", "BF16"}  # two floats of 16 bits can be taken for each other
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Oddity(NamedTuple):
    where: str
    detail: str


def oddities(
    raw: Mapping[str, Any], sites: Sequence[SiteRead], parameters: Iterable[TensorMeta]
) -> Iterator[Oddity]:
    """What stands out in `sites` and `parameters` of a plan; `raw` is the configuration."""
    slots = ((read, slot) for read in sites for slot in read.scheme.slots)
    dense = [read.stored[slot.leaf] for read, slot in slots if slot.holds == "matrix"]
    yield from _other_halves(raw, [*dense, *parameters])
    yield from _odd_halves(sites, beside={meta.name for meta in dense})
    yield from _unlike_their_scales(sites)
    yield from _odd_groups(sites)


def _unlike_their_scales(sites: Iterable[SiteRead]) -> Iterator[Oddity]:
    """MLX makes scales and biases of a matrix together, in one dtype."""
    for read in sites:
        scales, biases = read.stored.get("scales"), read.stored.get("biases")
        if scales and biases and {scales.dtype, biases.dtype} == _HALVES:
            yield Oddity(biases.name, f"stored as {biases.dtype}, its scales as {scales.dtype}")


def _other_halves(raw: Mapping[str, Any], stored: Sequence[TensorMeta]) -> Iterator[Oddity]:
    """Only the configuration knows which of the two was meant, or, where it errs, all others."""
    said = raw.get("dtype") or raw.get("torch_dtype")
    other = {"bfloat16": "F16", "float16": "BF16"}.get(str(said))
    rare = _rare_half(stored)
    for meta in stored:
        if meta.dtype == other:
            yield Oddity(meta.name, f"stored as {other}, although config.json's dtype is {said}")
        elif meta.dtype == rare:
            yield Oddity(meta.name, f"stored as {rare}, unlike nearly all others")


def _rare_half(stored: Iterable[TensorMeta]) -> str | None:
    counts = Counter(meta.dtype for meta in stored if meta.dtype in _HALVES).most_common()
    if len(counts) < 2 or counts[0][1] < FEW * counts[1][1]:
        return None
    return counts[1][0]


def _odd_halves(sites: Iterable[SiteRead], *, beside: Collection[str]) -> Iterator[Oddity]:
    """Scales and the like: the others of their name know, in whatever bits their matrices are."""
    leaves: dict[str, list[TensorMeta]] = {}
    for read in sites:
        for leaf, meta in read.stored.items():
            if meta.dtype in _HALVES and meta.name not in beside:
                leaves.setdefault(leaf, []).append(meta)
    for leaf, metas in leaves.items():
        rare = _rare_half(metas)
        for meta in (meta for meta in metas if meta.dtype == rare):
            yield Oddity(meta.name, f"{leaf} is {rare}, where nearly all others' is not")


def _odd_groups(sites: Sequence[SiteRead]) -> Iterator[Oddity]:
    """One of a kind whose entries share scales in other groups than those of all others.

    Widths may differ: recipes give more bits to some layers, and none gives one another grouping.
    """
    kinds: dict[tuple[object, ...], list[SiteRead]] = {}
    for read in sites:
        kind = (_NUMBER.sub("*", read.site.name), read.part, type(read.scheme), read.scheme.bits)
        if hasattr(read.scheme, "group"):
            kinds.setdefault(kind, []).append(read)
    for reads in kinds.values():
        counts = Counter(read.scheme.name for read in reads)
        if len(reads) >= FEW and len(counts) == 2 and min(counts.values()) == 1:
            usual = counts.most_common(1)[0][0]
            odd = next(read for read in reads if read.scheme.name != usual)
            detail = f"stored as {odd.scheme.name}, where all others of its kind are {usual}"
            yield Oddity(odd.site.name, detail)
