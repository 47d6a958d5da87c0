"""A plan's matrices one by one, for those who want numbers and no model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cabochon.load.execute import build_weight
from cabochon.load.plan import LoadPlan, SiteRead
from cabochon.nn.weight import Stack, Weight


@dataclass(frozen=True, slots=True)
class Matrix:
    """One site, whole, by however many tensors it is stored."""

    name: str
    reads: tuple[SiteRead, ...]  # one, or all parts in their order

    @property
    def stored_as(self) -> str:
        return " and ".join(dict.fromkeys(read.stored_as for read in self.reads))

    @property
    def parts(self) -> int:
        """Into how many equal slices of rows it falls, however it is stored: experts, mostly."""
        first = self.reads[0]
        return first.site.parts if first.part is None else len(self.reads)

    @property
    def size(self) -> tuple[int, int]:
        """Rows, of all parts together, and columns."""
        site = self.reads[0].site
        return len(self.reads) * site.out_features, site.in_features

    @property
    def nbytes(self) -> int:
        return sum(read.nbytes for read in self.reads)

    def weight(self) -> Weight:
        """The matrix in its stored bits, read anew at each call.

        Raises:
            UnreadableError: a file ended early.
            LoadError: a value cannot be right; the text names the tensor.
        """
        parts = [build_weight(read, torch.float32) for read in self.reads]
        return parts[0] if self.reads[0].part is None else Stack(parts)


def matrices(plan: LoadPlan) -> Iterator[Matrix]:
    """The matrices of `plan` in the order in which the model holds them."""
    assert not plan.problems
    reads: dict[str, list[SiteRead]] = {}
    for read in plan.sites:
        reads.setdefault(read.site.name, []).append(read)
    for name, found in reads.items():
        yield Matrix(name, tuple(sorted(found, key=lambda read: read.part or 0)))
