"""What `nn.look` finds, by compiled code: what it is told, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Mapping

from cabochon.kernels import library
from cabochon.kernels.library import Numbers
from cabochon.nn.found import NOTHING, POWERS, Found

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


def numbers_of(kind: str, size: int) -> Numbers:
    """For compiled code: `kind` as `nn.look` has it, of blocks or floats of `size` bytes."""
    if kind in _BLOCKS:
        form, first, second = _BLOCKS[kind]
        return Numbers(form, size, first, second)
    if kind == NOTHING:
        return Numbers(_NOTHING)
    if kind == POWERS:
        return Numbers(1, 1, 0xFF)
    return Numbers(size, size, (1 << (8 * size - 1)) - 1)


def found_of(kind: str, hashed: bytes, found: library.Found) -> Found:
    """What compiled code found in numbers of `kind`."""
    from cabochon.nn.look import magnitude_of

    if kind in _BLOCKS:
        return Found(hashed, found.count, *_scales(found, kind), found.bad)
    if kind == NOTHING:
        return Found(hashed)
    zeros = 0 if kind == POWERS else found.zeros
    return Found(hashed, found.count, zeros, magnitude_of(found.top, kind))


def _scales(found: library.Found, kind: str) -> tuple[int, float]:
    """How many are zero, and the largest."""
    import numpy as np

    from cabochon.nn.gguf_blocks import KINDS
    from cabochon.nn.look import magnitude_of

    levels, form = KINDS[kind].levels, _BLOCKS[kind][0]
    if levels is not None:
        counts, known = np.ctypeslib.as_array(found.octets), levels.abs().numpy()
        return int(counts[known == 0].sum()), float(known[counts > 0].max(initial=0.0))
    if form == _HALF:
        return found.zeros, magnitude_of(found.top, "F16")
    return found.zeros, found.largest
