"""`nn.look` by compiled code."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from cabochon.kernels import library
from cabochon.kernels.library import Library, Numbers, address, threads
from cabochon.nn.gguf_blocks import KINDS
from cabochon.nn.look import FLOATS, HASHED, NOTHING, POWERS, Found, Look, magnitude_of, plainly

_NOTHING, _HALF, _OCTETS, _Q2, _Q3, _Q4, _Q6, _IQ4 = 0, 5, 6, 7, 8, 9, 10, 11

# By ggml's name of a block: its form, and where its float16s are, or how many octets are scales and
# what none of them may exceed.
_BLOCKS: Mapping[str, tuple[int, int, int]] = {
    "Q4_0": (_HALF, 0, -1), "Q4_1": (_HALF, 0, 2), "Q5_0": (_HALF, 0, -1), "Q5_1": (_HALF, 0, 2),
    "Q8_0": (_HALF, 0, -1), "IQ4_NL": (_HALF, 0, -1),
    "Q2_K": (_Q2, 80, 82), "Q3_K": (_Q3, 108, -1), "Q4_K": (_Q4, 0, 2), "Q5_K": (_Q4, 0, 2),
    "Q6_K": (_Q6, 208, -1), "IQ4_XS": (_IQ4, 0, -1),
    "MXFP4": (_OCTETS, 1, 252), "NVFP4": (_OCTETS, 4, 126),
}  # fmt: skip


def looking(library: Library | None) -> Look:
    """What looks at stored bytes: the library's code, or numpy where it was not built."""
    if library is None:
        return plainly

    def look(octets: Tensor, kind: str) -> Found:
        size = octets.numel()
        sums = np.empty(size // HASHED, "<u8")
        found = _found(library, octets, kind, sums)
        hashed = sums.tobytes() + octets.numpy()[len(sums) * HASHED :].tobytes()
        if kind in KINDS:
            return Found(hashed, found.count, *_scales(found, kind), found.bad)
        if kind == NOTHING:
            return Found(hashed)
        zeros = 0 if kind == POWERS else found.zeros
        return Found(hashed, found.count, zeros, magnitude_of(found.top, kind))

    return look


def _found(by: Library, octets: Tensor, kind: str, sums: np.ndarray) -> library.Found:
    found = library.Found()
    by.look(_numbers(kind), address(octets), octets.numel(), sums.ctypes.data, found, threads())
    return found


def _numbers(kind: str) -> Numbers:
    if kind in KINDS:
        form, first, second = _BLOCKS[kind]
        return Numbers(form, KINDS[kind].layout.nbytes, first, second)
    if kind == NOTHING:
        return Numbers(_NOTHING)
    if kind == POWERS:
        return Numbers(1, 1, 0xFF)
    size = FLOATS[kind].itemsize
    return Numbers(size, size, (1 << (8 * size - 1)) - 1)


def _scales(found: library.Found, kind: str) -> tuple[int, float]:
    """How many are zero, and the largest."""
    levels, form = KINDS[kind].levels, _BLOCKS[kind][0]
    if levels is not None:
        counts, known = np.ctypeslib.as_array(found.octets), levels.abs().numpy()
        return int(counts[known == 0].sum()), float(known[counts > 0].max(initial=0.0))
    if form == _HALF:
        return found.zeros, magnitude_of(found.top, "F16")
    return found.zeros, found.largest
