"""Tensors that a matrix may have or not: there for all matrices of a group or for none of them.

Without one of them a matrix still fits a scheme, and would be another matrix in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from cabochon.quant.byte_codes import ByteCodes
from cabochon.quant.claims import Claim
from cabochon.quant.packed_int import PackedInt
from cabochon.quant.scheme import Dense

if TYPE_CHECKING:
    from cabochon.load.plan import SiteRead

_SMOOTHING = "pre_quant_scale"
_NUMBER = re.compile(r"\d+")
# The norm before them may take it over.
_AFTER_NORMS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "gate_up_proj")


def half_given(reads: Iterable[SiteRead], claims: Mapping[str, Claim]) -> Iterator[tuple[str, str]]:
    """The names of matrices that lack what others of their group have, and what that is."""
    rules: dict[str, list[SiteRead]] = {}
    places: dict[tuple[str, ...], list[SiteRead]] = {}
    reads = list(reads)
    beside: dict[str, list[str]] = {}
    for read in reads:
        beside.setdefault(_parent(read), []).append(read.site.name.rpartition(".")[2])
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


def unlike_others(reads: Iterable[SiteRead]) -> Iterator[tuple[str, str]]:
    """The same of matrices beside others than theirs, which a producer may treat otherwise."""
    names: dict[str, list[SiteRead]] = {}
    for read in reads:
        if not isinstance(read.scheme, Dense) and not read.site.name.endswith(_AFTER_NORMS):
            names.setdefault(_NUMBER.sub("*", read.site.name), []).append(read)
    for name, members in names.items():
        without = [read for read in members if _SMOOTHING not in read.stored]
        yield from _told(without, members, _SMOOTHING, f"matrices of the same name ({name})")


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
