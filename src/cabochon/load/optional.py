"""Tensors that a matrix may have or not: there for all matrices of a group or for none of them.

Without one of them a matrix still fits a scheme, and would be another matrix in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from cabochon.quant.byte_codes import ByteCodes
from cabochon.quant.claims import Claim
from cabochon.quant.modelopt_schemes import Smoothed
from cabochon.quant.packed_int import PackedInt
from cabochon.quant.scheme import Dense, Scheme

if TYPE_CHECKING:
    from cabochon.load.plan import SiteRead

_SMOOTHING = "pre_quant_scale"
_NUMBER = re.compile(r"\d+")


def half_given(reads: Sequence[SiteRead], claims: Mapping[str, Claim]) -> Iterator[tuple[str, str]]:
    """The names of matrices that lack what others of their group have, and what that is."""
    rules: dict[str, list[SiteRead]] = {}
    places: dict[tuple[str, ...], list[SiteRead]] = {}
    beside = _beside(reads)
    for read in reads:
        if isinstance(read.scheme, PackedInt | ByteCodes):
            rules.setdefault(claims[read.site.name].rule, []).append(read)
        if not isinstance(read.scheme, Dense):
            places.setdefault(_place(read, beside), []).append(read)
    for rule, members in rules.items():
        kinds = (PackedInt, ByteCodes)
        without = [r for r in members if isinstance(r.scheme, kinds) and r.scheme.symmetric]
        under = f"matrices under the same rule ({rule})"
        yield from _told(without, members, "weight_zero_point", under)
    for (place, *_), members in places.items():
        without = [read for read in members if _SMOOTHING not in read.stored]
        yield from _told(without, members, _SMOOTHING, f"matrices in the same place ({place})")


def unlike_others(reads: Sequence[SiteRead]) -> Iterator[tuple[str, str]]:
    """The same of matrices in no such group, which a producer may treat each in its own way."""
    beside = _beside(reads)
    alike: dict[Scheme, list[SiteRead]] = {}
    for read in reads:
        if not isinstance(read.scheme, Dense) and not _taken_over(read, beside):
            scheme = read.scheme.inner if isinstance(read.scheme, Smoothed) else read.scheme
            alike.setdefault(scheme, []).append(read)
    for scheme, members in alike.items():
        without = [read for read in members if _SMOOTHING not in read.stored]
        who = f"matrices in {scheme.name} whose smoothing no norm takes over"
        yield from _told(without, members, _SMOOTHING, who)


def _taken_over(read: SiteRead, beside: Mapping[str, list[str]]) -> bool:
    """Whether the norm before a matrix may hold its smoothing."""
    leaf = read.site.name.rpartition(".")[2]
    if leaf == "q_proj":
        return "k_proj" in beside[_parent(read)]
    return leaf in ("k_proj", "v_proj", "gate_proj", "up_proj", "gate_up_proj")


def _beside(reads: Sequence[SiteRead]) -> Mapping[str, list[str]]:
    """What each module has of matrices."""
    found: dict[str, list[str]] = {}
    for read in reads:
        found.setdefault(_parent(read), []).append(read.site.name.rpartition(".")[2])
    return found


def _parent(read: SiteRead) -> str:
    return read.site.name.rpartition(".")[0]


def _place(read: SiteRead, beside: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Where a matrix is in its layer, and beside which others.

    ModelOpt moves the smoothing of queries, keys and values into the norm before them; queries
    alone, in layers that use the keys of others, keep it.
    """
    return _NUMBER.sub("*", read.site.name), *sorted(set(beside[_parent(read)]))


def _told(
    without: list[SiteRead], members: list[SiteRead], leaf: str, who: str
) -> Iterator[tuple[str, str]]:
    if 0 < len(without) < len(members):
        having = len(members) - len(without)
        detail = f"{leaf} is missing, but {having} of {len(members)} {who} have one"
        yield from ((read.site.name, detail) for read in without)
