"""`Source`: what a matrix is packed from, as the kernels are told of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from cabochon.kernels import library
from cabochon.kernels.library import Grouped, Stored
from cabochon.nn.layout import Layout
from cabochon.nn.weight import Coded


class Source(NamedTuple):
    """What a matrix is packed from."""

    stored: Stored
    parts: tuple[Tensor, ...]  # what is read of it

    @classmethod
    def of(cls, coded: Coded, placed: Mapping[int, Tensor]) -> Source:
        """The codes of `coded`, and the numbers of its groups by their places in a block."""
        octets = coded.octets
        assert octets.stride(1) == 1
        stored = Stored(
            rows=octets.data_ptr(),
            ld=octets.stride(0),
            bytes=octets.shape[1],
            layout=_struct(coded.layout),
            grouped=tuple(_grouped(at, tensor) for at, tensor in placed.items()),
        )
        levels = () if coded.levels is None else (coded.levels,)
        return cls(stored, (octets, *placed.values(), *levels))


def _struct(layout: Layout) -> library.Layout:
    planes = [library.Plane(p.at, p.bits, p.run, p.to) for p in layout.planes]
    return library.Layout(
        layout.entries,
        layout.nbytes,
        layout.flip,
        layout.high_first,
        len(planes),
        (library.Plane * 2)(*planes),
    )


def _grouped(at: int, tensor: Tensor) -> Grouped:
    size = tensor.element_size()
    row, group = (step * size for step in tensor.stride())
    return Grouped(tensor.data_ptr(), at, row, group, tensor.shape[1], size)
