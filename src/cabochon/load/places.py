"""Every stored tensor and what becomes of it: one line of a table each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cabochon.checkpoint.headers import HEADER_ONLY, TensorMeta
from cabochon.load.plan import LoadPlan

MOST = 3  # places of a tensor that are named one by one

Fate = Literal["matrix", "parameter", "dropped", "refused"]


@dataclass(frozen=True, slots=True)
class Placed:
    """A stored tensor. `where` is the module that takes it, or why none does."""

    tensor: TensorMeta
    fate: Fate
    where: str
    scheme: str = ""

    def as_dict(self) -> dict[str, Any]:
        tensor = self.tensor
        return {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "file": tensor.file.name.removesuffix(HEADER_ONLY),
            "start": tensor.span[0],
            "fate": self.fate,
            "where": self.where,
            "scheme": self.scheme,
        }


def places(tensors: Mapping[str, TensorMeta], plan: LoadPlan | None) -> Iterator[Placed]:
    """One for each of `tensors`, in the order of the files."""
    known: dict[str, list[tuple[Fate, str, str]]] = {}
    for name, place in _known(plan) if plan is not None else ():
        known.setdefault(name, []).append(place)
    for name, tensor in tensors.items():
        found = known.get(name, [("refused", "no place", "")])
        fate, _, scheme = found[0]
        yield Placed(tensor, fate, _together([where for _, where, _ in found]), scheme)


def _together(places: Sequence[str]) -> str:
    """Where a tensor goes whose rows belong to several: queries, keys and values, or experts."""
    if len(places) <= MOST:
        return " and ".join(places)
    return f"{places[0]}, and {len(places) - 1} others up to {places[-1]}"


def table(placed: Iterable[Placed]) -> Iterator[str]:
    """For a terminal: what is stored, then what it becomes."""
    for row in placed:
        tensor = row.tensor
        shape = "x".join(map(str, tensor.shape)) or "()"
        scheme = f" ({row.scheme})" if row.scheme else ""
        yield f"{tensor.name}  {tensor.dtype} {shape}  {row.fate}: {row.where}{scheme}"


def _known(plan: LoadPlan) -> Iterator[tuple[str, tuple[Fate, str, str]]]:
    for read in plan.sites:
        part = "" if read.part is None else f", part {read.part}"
        for leaf, meta in read.stored.items():
            where = f"{read.site.name}{part}, {leaf}"
            yield meta.name, ("matrix", where, read.stored_as)
    for parameter in plan.parameters:
        yield parameter.tensor.name, ("parameter", parameter.parameter.name, "")
    for drop in plan.dropped:
        yield drop.tensor.name, ("dropped", drop.reason, "")
