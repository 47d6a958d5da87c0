"""`Looking`: compiled code finds what `nn.look` does. No torch, until something is found."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

from cabochon.kernels import library
from cabochon.kernels.backlog import Backlog
from cabochon.kernels.library import Numbers, Stretch
from cabochon.nn.found import HASHED, NOTHING, POWERS, Found

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


def _numbers_of(kind: str, size: int) -> Numbers:
    if kind in _BLOCKS:
        form, first, second = _BLOCKS[kind]
        return Numbers(form, size, first, second)
    if kind == NOTHING:
        return Numbers(_NOTHING)
    if kind == POWERS:
        return Numbers(1, 1, 0xFF)
    return Numbers(size, size, (1 << (8 * size - 1)) - 1)


class Looking:
    """Looks at bytes of a file from now on.

    Args:
        span: from byte to byte.
        kind: what they hold, as `nn.look` has it.
        unit: bytes of a block or a float.
        every: of how many blocks one is kept; 0 for none.

    Raises:
        OSError: there is no such file.
    """

    def __init__(
        self,
        backlog: Backlog,
        path: Path,
        span: tuple[int, int],
        kind: str,
        unit: int,
        every: int = 0,
    ) -> None:
        self._backlog = backlog
        self._kind = kind
        start, stop = span
        whole, rest = divmod(stop - start, HASHED)
        self._sums = ctypes.create_string_buffer(whole * 8 + rest)
        self._sample = ctypes.create_string_buffer(
            -(-(stop - start) // (unit * every)) * unit if every else 0
        )
        self._found = library.Found()
        self._number = backlog.look(
            Stretch(
                file=backlog.file(path),
                at=start,
                size=stop - start,
                every=every,
                numbers=_numbers_of(kind, unit),
                sums=ctypes.addressof(self._sums),
                sample=ctypes.addressof(self._sample),
                found=ctypes.pointer(self._found),
            ),
            self._sums,
            self._sample,
            self._found,
        )

    def found(self) -> Found:
        """What is there, when it has been seen.

        Raises:
            EOFError: the file has ended before.
            OSError: it cannot be read.
        """
        from cabochon.nn.look import magnitude_of

        self._backlog.wait(self._number)
        found, kind, hashed = self._found, self._kind, self._sums.raw
        if found.error:
            raise EOFError if found.error < 0 else OSError(found.error, os.strerror(found.error))
        if kind in _BLOCKS:
            return Found(hashed, found.count, *_scales(found, kind), found.bad)
        if kind == NOTHING:
            return Found(hashed)
        zeros = 0 if kind == POWERS else found.zeros
        return Found(hashed, found.count, zeros, magnitude_of(found.top, kind))

    def sample(self) -> bytearray:
        """The blocks that were kept, when `found` has returned."""
        return bytearray(self._sample.raw)


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
