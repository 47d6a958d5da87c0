"""One pass over stored bytes: what goes into their hash, and how the numbers among them look.

`plainly` does it in numpy, and says what is counted; kernels do the same at the speed of memory.

The hash of a tensor is SHA-256 of sums, one of each whole 64 KiB from its first byte on, and of the
bytes that are left. A sum is of the 64-bit words w_i of these 64 KiB, little-endian, modulo 2^64:
0x9E3779B97F4A7C15 * (1 * w_0 + 3 * w_1 + 5 * w_2 + ...). Bytes that differ, and words that change
places, change it. It is meant against accidents, and as fast as memory: SHA-256 of all bytes would
double a load's time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cabochon.nn.found import HASHED, NOTHING, POWERS, Found
from cabochon.nn.gguf_blocks import KINDS, damaged, look_at

Array = np.ndarray[Any, np.dtype[Any]]

FACTOR = 0x9E3779B97F4A7C15

# Numbers of which a magnitude is told by the bits: by the name that headers have for them.
FLOATS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes
_PLACES = np.arange(1, HASHED // 4, 2, dtype=np.uint64) * np.uint64(FACTOR)
_SUMS = 1 << 9  # that one thread makes
_PIECE = 1 << 22  # floats that one thread looks through
_TILE = 1 << 18  # entries, or blocks, that stay in its cache


def plainly(octets: Tensor, kind: str) -> Found:
    """What is found in uint8 `[n]`, in as many threads as torch has.

    They hold a `kind`: a key of FLOATS or KINDS, POWERS, NOTHING.
    """
    hashed = _hashed(octets.numpy())
    if kind in KINDS:
        return Found(hashed, *_look_at_blocks(octets, kind))
    if kind == NOTHING:
        return Found(hashed)
    size = 1 if kind == POWERS else FLOATS[kind].itemsize
    bits = octets.numpy().view(_BITS[size])
    if kind == POWERS:
        return Found(hashed, len(bits), 0, magnitude_of(int(bits.max(initial=0)), kind))
    seen = _in_pieces(_look_at_bits, bits, _PIECE)
    top = max((most for most, _ in seen), default=0)
    return Found(hashed, len(bits), sum(zeros for _, zeros in seen), magnitude_of(top, kind))


def magnitude_of(bits: int, kind: str) -> float:
    """The float of that kind, or power of two, that has these bits; all that is none is NaN."""
    if kind == POWERS:
        return math.nan if bits == 255 else math.ldexp(1.0, bits - 127)
    dtype = FLOATS[kind]
    exact = np.array([bits], _BITS[dtype.itemsize])
    return float(torch.from_numpy(exact).view(dtype).float())


def _hashed(octets: Array) -> bytes:
    whole = len(octets) // HASHED * HASHED
    words = octets[:whole].view("<u8").reshape(-1, HASHED // 8)
    return b"".join(_in_pieces(_sums, words, _SUMS)) + octets[whole:].tobytes()


def _sums(words: Array) -> bytes:
    sums: Array = np.einsum("ij,j->i", words, _PLACES)
    return sums.tobytes()


def _in_pieces(look: Callable[[Array], Any], entries: Array, piece: int) -> list[Any]:
    pieces = [entries[start : start + piece] for start in range(0, len(entries), piece)]
    if len(pieces) <= 1:
        return [look(piece) for piece in pieces]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(look, pieces))


def _look_at_bits(bits: Array) -> tuple[int, int]:
    """The largest of `bits` without their highest, and how many are zero then.

    Without their signs, floats are ordered as their bits are; what is no number is above infinity.
    """
    room = np.empty(min(len(bits), _TILE), bits.dtype)
    largest = zeros = 0
    for start in range(0, len(bits), _TILE):
        tile = bits[start : start + _TILE]
        shifted = np.add(tile, tile, out=room[: len(tile)])
        largest = max(largest, int(shifted.max()))
        zeros += len(tile) - int(np.count_nonzero(shifted))
    return largest >> 1, zeros


def _look_at_blocks(octets: Tensor, kind: str) -> tuple[int, int, float, int]:
    """As in `Found`; of damaged blocks only how many there are."""
    count, dead, most, bad = 0, 0, 0.0, 0
    for tile in octets.view(-1, KINDS[kind].layout.nbytes).split(_TILE):
        bad += damaged(tile, kind)
        if not bad:
            found = look_at(tile, kind)
            count, dead, most = count + found[0], dead + found[1], max(most, found[2])
    return count, dead, most, bad
