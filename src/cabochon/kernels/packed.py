"""`PackedWeight`: a matrix of codes, repacked into the order in which the kernels read it."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from cabochon.kernels.arena import ALIGNMENT, Arena
from cabochon.kernels.backlog import Backlog, at_once
from cabochon.kernels.library import Activations, Library, Matrix, address, threads
from cabochon.kernels.search import Found
from cabochon.kernels.source import Source
from cabochon.nn.minifloat import E4M3, E8M0
from cabochon.nn.softcap import SoftCap
from cabochon.nn.weight import Coded, Weight

ROWS, UNIT = 32, 32  # of a block, and columns of its units; csrc/api.h
FINE = 254  # second digits of a value are as much as one first; csrc/api.h
UNIT_BYTES = (512, 1024, 512, 512, 256, 384, 640, 768)  # by the kind of codes
FLOATS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # kinds of scales

_DIGITS: dict[Activations, int] = {"int8": 1, "int16": 2, "float32": 0}
ACTIVATIONS = tuple(_DIGITS)
_CODES = {4: 0, 8: 1, 2: 4, 3: 5, 5: 6, 6: 7}
_TABLE, _TABLE2 = 2, 3
_LEVEL, _SUB_U8, _SUB_I8, _E4M3, _E8M0 = 3, 4, 5, 6, 7
_LARGEST_UNIT = 64.0  # the kernels multiply it by 2**120
_ZERO_POINT, _SUB_MINIMUM = 1, 4
_MINIMA = {torch.float16: 2, torch.float32: 3, torch.bfloat16: 5}
_ROUND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Table(NamedTuple):
    """Sixteen values as bytes that sum up to them: `(first + second / FINE - zero) * gain`."""

    kind: int
    digits: list[int]  # 16 of the first, 16 of the second
    zero: int
    gain: float


def unsupported(coded: Coded) -> str | None:
    """Why the kernels cannot compute this; None if they can."""
    if coded.group % 16 and coded.scales.shape[1] > 1:
        return f"groups of {coded.group} are no multiple of 16"
    if coded.rounded not in _ROUND:
        return f"entries are rounded to {coded.rounded}"
    return None


class PackedWeight(Weight):
    """What `coded` describes; `dense` gives the same numbers, bit for bit.

    Args:
        coded: the matrix, which is not needed any more afterwards.
        activations: `int8` rounds each 32 inputs to 8 bits, `int16` to two times 8, `float32` not
            at all.
        arena: where its memory is taken from.
        backlog: what does the work; it may compute when that is finished. Without one, at once.
        later: it takes memory, and is packed, when all of its products or entries are wanted; rows
            are looked up where they are stored, which stays as long as this does.
    """

    def __init__(
        self,
        library: Library,
        coded: Coded,
        activations: Activations,
        *,
        out_features: int,
        in_features: int,
        arena: Arena,
        backlog: Backlog | None = None,
        later: bool = False,
    ) -> None:
        assert unsupported(coded) is None
        super().__init__(out_features, in_features)
        self.activations = activations
        self._library = library
        self.register_buffer("levels", coded.levels)
        halves = -(-coded.group // 16)
        if coded.scales.shape[1] == 1:  # a row is a group
            halves = 2 * -(-in_features // UNIT)
        elif halves > 1 and halves % 2:  # a scale may change within a unit: one for each half
            coded, halves = _by_halves(coded, halves), 1
        self.matrix = self._describe(coded, halves)
        self.register_buffer("data", None)
        source = Source.of(coded, self._placed(coded))
        self.source = source if later else None
        self._packing = Lock()
        if not later:
            self.data = self._packed(source, arena, backlog)

    data: Tensor | None  # uint8 [bytes]
    levels: Tensor | None

    def _describe(self, coded: Coded, halves: int) -> Matrix:
        units = -(-self.in_features // UNIT)
        groups = coded.scales.shape[1]
        if halves == 1:
            groups += groups % 2  # a cut unit's second half reads a scale too
        matrix = Matrix(
            rows=self.out_features,
            columns=self.in_features,
            units=units,
            groups=groups,
            halves=halves,
            per_shared=1
            if coded.shared is None
            else coded.scales.shape[1] // coded.shared.shape[1],
            digits=_DIGITS[self.activations],
            round=_ROUND[coded.rounded],
            levels=address(self.levels),
            scales=_kind_of_scales(coded),
            minima=_kind_of_minima(coded),
            codes=_CODES[coded.bits],
            zero=coded.zero,
            gain=1.0,
        )
        if coded.levels is not None:
            matrix.scales, matrix.unit = _floats_of(coded.levels, coded.scales)
        if coded.values is not None:
            table = _table(coded.values)
            matrix.codes, matrix.zero = table.kind, table.zero
            matrix.gain = table.gain
            matrix.table = (ctypes.c_uint8 * 32)(*table.digits)
            matrix.values = (ctypes.c_float * 16)(*coded.values)
        return matrix

    def _placed(self, coded: Coded) -> dict[int, Tensor]:
        """The numbers of groups by their places in a block, which the matrix is told."""
        matrix = self.matrix
        numbers = {
            "": coded.scales,
            "shared": coded.shared,
            "minima": coded.zeros if coded.minima is None else coded.minima,
            "shared_minima": coded.shared_minima,
        }
        at = 0
        placed: dict[int, Tensor] = {}
        for name, tensor in numbers.items():
            if name:
                setattr(matrix, f"{name}_at", at)
            if tensor is not None:
                if name in ("", "minima") and tensor.shape[1] < matrix.groups:
                    tensor = torch.nn.functional.pad(tensor, (0, 1))
                placed[at] = tensor
                size = tensor.shape[1] * ROWS * tensor.element_size()
                at += -(-size // ALIGNMENT) * ALIGNMENT
        matrix.codes_at = at
        matrix.stride = at + matrix.units * UNIT_BYTES[matrix.codes]
        return placed

    def _packed(self, source: Source, arena: Arena, backlog: Backlog | None = None) -> Tensor:
        """The matrix in memory of its own."""
        data = arena.take(self.nbytes)
        self.matrix.data = address(data)
        with at_once(self._library, backlog) as work:
            work.pack(self.matrix, source.stored, data, *source.parts)
        return data

    @property
    def nbytes(self) -> int:
        """Of the matrix as products read it."""
        return int(-(-self.out_features // ROWS) * self.matrix.stride)

    def _ready(self) -> Matrix:
        with self._packing:
            if self.data is None:
                assert self.source is not None
                arena = Arena(self._library)
                self.data = self._packed(self.source, arena)  # not before all of it is there
                arena.enlarge()
        return self.matrix

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.out_features if stop is None else stop
        out = torch.empty(stop - start, self.in_features)
        self._library.dense(self._ready(), None, start, len(out), address(out), threads())
        return out.to(dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        wanted = ids.flatten().contiguous()
        out = torch.empty(len(wanted), self.in_features)
        count, to = len(out), address(out)
        if self.data is None and self.source is not None:
            stored = self.source.stored
            self._library.picked(self.matrix, stored, address(wanted), count, to, threads())
        else:
            self._library.dense(self.matrix, address(wanted), 0, count, to, threads())
        return out.to(dtype).view(*ids.shape, self.in_features)

    def linear(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.out_features if stop is None else stop
        flat = x.reshape(-1, self.in_features).float().contiguous()
        y = torch.empty(len(flat), stop - start)
        self._library.times(
            self._ready(),
            address(flat),
            self.in_features,
            len(flat),
            start,
            stop,
            address(y),
            stop - start,
            threads(),
        )
        return y.to(x.dtype).view(*x.shape[:-1], stop - start)

    def shortlist(self, x: Tensor, cap: SoftCap) -> Found:
        return Found(self._library, self.linear(x.float()), x, cap)


def _kind_of_scales(coded: Coded) -> int:
    if coded.levels is not None:
        return _LEVEL
    if coded.shared is not None:
        return _SUB_I8 if coded.scales.dtype is torch.int8 else _SUB_U8
    return FLOATS[coded.scales.dtype]


def _floats_of(levels: Tensor, scales: Tensor) -> tuple[int, float]:
    """Which 8-bit floats `levels[scales]` are, and times what; a table is looked up slowly."""
    for kind, floats in ((_E4M3, E4M3), (_E8M0, E8M0)):
        known = floats.isfinite() & levels.isfinite()
        known[int(scales.max()) + 1 :] = False  # E4M3 without a sign is stored too
        at = int(floats.where(known, 0).argmax())
        unit = float(levels[at] / floats[at])
        made = floats[known].double() * unit
        # Within a rounding of float32: far below what rounded inputs are off by.
        close = ((levels[known] - made).abs() <= made.abs() * 2**-23).all()
        if close and abs(unit) < _LARGEST_UNIT:
            return kind, unit
    return _LEVEL, 1.0


def _kind_of_minima(coded: Coded) -> int:
    if coded.zeros is not None:
        return _ZERO_POINT
    if coded.minima is None:
        return 0
    if coded.shared_minima is not None:
        return _SUB_MINIMUM
    return _MINIMA[coded.minima.dtype]


def _by_halves(coded: Coded, halves: int) -> Coded:
    """The same with groups of 16."""

    def spread(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.repeat_interleave(halves, dim=1)

    scales = spread(coded.scales)
    assert scales is not None
    return replace(
        coded, group=16, scales=scales, zeros=spread(coded.zeros), minima=spread(coded.minima)
    )


def _table(values: tuple[float, ...]) -> _Table:
    """Sixteen values as multiples of one step, if that can be exact, or else as two digits."""
    step = min(abs(value) for value in values if value)
    multiples = [value / step for value in values]
    low, high = round(min(multiples)), round(max(multiples))
    if all(multiple.is_integer() for multiple in multiples) and high - low <= 31:
        return _Table(_TABLE, [int(m) - low for m in multiples] + [0] * 16, -low, step)
    largest = max(abs(value) for value in values)
    scaled = [value / largest * 127 for value in values]
    coarse = [round(value) for value in scaled]
    fine = [round((value - near) * FINE) for value, near in zip(scaled, coarse, strict=True)]
    digits = [digit + 128 for digit in coarse + fine]
    return _Table(_TABLE2, digits, 128, largest / 127)
