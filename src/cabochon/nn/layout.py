"""`Layout`: where the codes of a row lie in its bytes. Kernels repack by it, `codes` spells it out.

A row is a sequence of blocks, each of so many entries in so many bytes. The bits of a code may lie
in several planes of a block: ggml keeps the fifth bits of its codes apart from the other four.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.nn import bits as streams


@dataclass(frozen=True, slots=True)
class Plane:
    """Some bits of each code of a block.

    With a `run`, the low bits of that many bytes are the first entries, the next bits of the same
    bytes the entries behind those, and so on; then come the next bytes. Without, bits are a stream:
    entry i begins at bit `i * bits`, low bits first.
    """

    at: int  # the plane's first byte in a block
    bits: int
    run: int = 0
    to: int = 0  # which bit of the code the lowest of them is

    def codes(self, blocks: Tensor, entries: int) -> Tensor:
        """uint8 `[n, bytes]` to uint8 `[n, entries]`, in their place in the code."""
        octets = blocks[:, self.at : self.at + -(-entries * self.bits // 8)]
        if not self.run:
            return _moved(streams.unpack(octets, self.bits, entries), self.to)
        runs, mask = octets.unflatten(1, (-1, self.run)), (1 << self.bits) - 1
        parts = [runs >> shift & mask for shift in range(0, 8, self.bits)]
        return _moved(torch.stack(parts, dim=2).flatten(1), self.to)


def _moved(codes: Tensor, to: int) -> Tensor:
    return codes << to if to else codes


@dataclass(frozen=True, slots=True)
class Layout:
    """Of blocks of `entries` entries, a multiple of 32, in `nbytes` bytes."""

    entries: int
    nbytes: int
    planes: tuple[Plane, ...]
    flip: int = 0  # bits of the code that are stored the other way round: signed bytes
    high_first: bool = False  # the first of two codes in a byte is its high half

    @classmethod
    def stream(cls, bits: int, *, flip: int = 0, high_first: bool = False) -> Layout:
        """Codes one after the other, without gaps."""
        assert not high_first or bits == 4
        return cls(32, 4 * bits, (Plane(0, bits),), flip, high_first)

    @property
    def bits(self) -> int:
        """Of a code."""
        return max(plane.to + plane.bits for plane in self.planes)

    def codes(self, octets: Tensor, count: int) -> Tensor:
        """The first `count` codes of each row: uint8 `[rows, n]` to uint8 `[rows, count]`."""
        missing = -octets.shape[1] % self.nbytes
        blocks = torch.nn.functional.pad(octets, (0, missing)) if missing else octets
        blocks = blocks.reshape(-1, self.nbytes)
        if self.high_first:
            blocks = blocks << 4 | blocks >> 4
        first, *others = (plane.codes(blocks, self.entries) for plane in self.planes)
        for other in others:
            first = first | other
        flipped = first ^ self.flip if self.flip else first
        return flipped.view(len(octets), -1)[:, :count]
