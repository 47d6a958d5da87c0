"""Values that cannot be right end a load: each check names the tensor. And how scales look."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cabochon.checkpoint.gguf import BLOCKS
from cabochon.checkpoint.headers import TensorMeta
from cabochon.checkpoint.mapped import pieces
from cabochon.errors import LoadError
from cabochon.nn.gguf_blocks import damaged, magnitudes
from cabochon.nn.gguf_blocks import look_at as look_at_scales_of
from cabochon.quant.scheme import Site, Slot

Array = np.ndarray[Any, np.dtype[Any]]

NVFP4_MAX = 448 * 6  # the largest block scale times the largest entry

_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}  # by bytes
# The least of the bytes, without their signs, that are not finite.
_FLOAT8_NAN = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
_E8M0_NAN = 255
_PIECE = 1 << 22  # entries that one thread looks through
_TILE = 1 << 18  # entries that stay in its cache
_SAMPLE = 1 << 12  # scales that a median is taken of


@dataclass(frozen=True, slots=True)
class Floats:
    """What one pass over floats finds."""

    largest: float  # magnitude
    zeros: int  # of either sign


@dataclass(frozen=True, slots=True)
class Scales:
    """What the scales of one matrix look like, without their signs."""

    count: int
    dead: int  # zeros: all that they stand for is zero
    largest: float
    median: float  # of those that are not zero; of a sample where they are many


Seen = Floats | Scales


def check(
    slot: Slot, tensor: Tensor, meta: TensorMeta, site: Site, dtype: torch.dtype
) -> Seen | None:
    """Refuse what `slot` of `site` cannot hold; floats must be finite in `dtype`.

    Raises:
        LoadError: the text names the tensor.
    """
    if slot.holds in ("matrix", "scales"):
        return check_finite(pieces(tensor, meta), meta, dtype)
    if slot.holds == "float8 scales":
        return check_finite([tensor], meta, dtype)
    if slot.holds == "blocks":
        return check_blocks(tensor, meta)
    if slot.holds == "shape":
        _check_shape(tensor, meta, site)
    elif slot.holds in ("divisor", "factor"):
        _check_global(float(tensor), meta, divides=slot.holds == "divisor")
    elif slot.holds in ("scale", "scale or none"):
        _check_scale(float(tensor), meta, may_lack=slot.holds == "scale or none")
    return None


def check_finite(parts: Iterable[Tensor], meta: TensorMeta, dtype: torch.dtype) -> Floats:
    """What is in all `parts` of a tensor, which are of one dtype.

    Refuse floats not finite in `dtype`; bytes are powers of two (E8M0).
    """
    largest, zeros = 0.0, 0
    for part in parts:
        found = look_at_powers(part) if part.dtype is torch.uint8 else look_at(part)
        zeros += found.zeros
        largest = found.largest if math.isnan(found.largest) else max(largest, found.largest)
        if not torch.tensor(largest).to(dtype).isfinite():
            break
    else:
        return Floats(largest, zeros)
    bad = sum(_not_finite(part, dtype) for part in parts)
    kind = str(dtype).removeprefix("torch.")
    raise LoadError(
        f"{meta.file}: tensor {meta.name!r} has {bad} of {math.prod(meta.shape)} values that are"
        f" not finite in {kind}; the checkpoint is damaged or was made by a quantizer that failed"
    )


def _not_finite(tensor: Tensor, dtype: torch.dtype) -> int:
    if tensor.dtype is torch.uint8:
        return int((tensor == _E8M0_NAN).sum())
    return int((~tensor.to(dtype).isfinite()).sum())


def look_at_powers(exponents: Tensor) -> Floats:
    """What the powers of two (E8M0) in a tensor look like."""
    most = 0 if exponents.numel() == 0 else int(exponents.max())
    return Floats(math.nan if most == _E8M0_NAN else math.ldexp(1.0, most - 127), 0)


def look_at(tensor: Tensor) -> Floats:
    """What the floats in `tensor` look like; what is no number is above infinity, and told as NaN.

    Without their signs, floats are ordered as their bits are. For a checkpoint of 6.9 GB this takes
    less than a tenth of the time to load it; torch's `aminmax` took up to a quarter.
    """
    bits = bits_of(tensor)
    seen = in_pieces(_look_at_bits, bits)
    most = np.array(max((largest for largest, _ in seen), default=0), bits.dtype)
    largest = torch.from_numpy(most).view(tensor.dtype).float()
    return Floats(float(largest), sum(zeros for _, zeros in seen))


def bits_of(tensor: Tensor) -> Array:
    """The entries of `tensor`, as unsigned integers in a row, not copied."""
    found: Array = tensor.view(_BITS[tensor.element_size()]).numpy().reshape(-1)
    return found


def in_pieces(look: Callable[[Array], Any], entries: Array, piece: int = _PIECE) -> list[Any]:
    """What `look` finds in each piece of `entries`, by as many threads as torch has."""
    pieces = [entries[start : start + piece] for start in range(0, len(entries), piece)]
    if len(pieces) <= 1:
        return [look(piece) for piece in pieces]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(look, pieces))


def _look_at_bits(bits: Array) -> tuple[int, int]:
    """The largest of `bits` without their highest, and how many are zero then."""
    room = np.empty(min(len(bits), _TILE), bits.dtype)
    largest = zeros = 0
    for start in range(0, len(bits), _TILE):
        tile = bits[start : start + _TILE]
        shifted = np.add(tile, tile, out=room[: len(tile)])
        largest = max(largest, int(shifted.max()))
        zeros += len(tile) - int(np.count_nonzero(shifted))
    return largest >> 1, zeros


def look_at_scales(tensor: Tensor, found: Floats) -> Scales:
    """`tensor` holds the scales of a matrix, in any dtype that is a float or E8M0."""
    flat = tensor.reshape(-1)
    sample = _magnitudes(flat[:: max(1, len(flat) // _SAMPLE)])
    return Scales(len(flat), found.zeros, found.largest, _median(sample))


def level_of(tensor: Tensor) -> float:
    """The median magnitude of a sample of `tensor`; 0 only if all of it is zero."""
    flat = tensor.reshape(-1)
    return _median(_magnitudes(flat[:: max(1, len(flat) // _SAMPLE)]))


def _median(sample: Tensor) -> float:
    """Of those that are not zero, by one thread: waking others for so little takes longer."""
    found = sample.flatten().numpy()
    alive = found[found > 0]
    middle = (len(alive) - 1) // 2
    return float(np.partition(alive, middle)[middle]) if len(alive) else 0.0


def _magnitudes(scales: Tensor) -> Tensor:
    if scales.dtype is torch.uint8:
        return torch.exp2(scales.float() - 127)
    return scales.float().abs()


def check_blocks(tensor: Tensor, meta: TensorMeta) -> Scales:
    """What scales are in blocks of ggml, in which scales and codes take turns.

    Raises:
        LoadError: one of them is no number.
    """
    size = BLOCKS[meta.dtype][1]
    count, dead, most, bad, seen = 0, 0, 0.0, 0, 0
    every = max(1, meta.nbytes // size // _SAMPLE)
    sample = []
    for part in pieces(tensor, meta):
        for tile in part.view(-1, size).split(_TILE):
            bad += damaged(tile, meta.dtype)
            if not bad:
                found = look_at_scales_of(tile, meta.dtype)
                count, dead, most = count + found[0], dead + found[1], max(most, found[2])
                sample.append(magnitudes(tile[-seen % every :: every], meta.dtype))
            seen += len(tile)
    if bad:
        raise LoadError(
            f"{meta.file}: tensor {meta.name!r} has {bad} of {seen} blocks whose scale is not"
            " finite; the checkpoint is damaged or was made by a quantizer that failed"
        )
    return Scales(count, dead, most, _median(torch.cat(sample)))


def _check_global(value: float, meta: TensorMeta, *, divides: bool) -> None:
    """Read in the wrong direction, it would allow entries a hundred times above any that occur."""
    entry = NVFP4_MAX / value if divides and value else NVFP4_MAX * value
    if not 0 < entry < 10_000:
        raise LoadError(
            f"{meta.file}: tensor {meta.name!r} is {value:g}, which allows entries up to"
            f" {entry:g}; it is damaged, or the reciprocal of what its name says"
        )


def _check_scale(value: float, meta: TensorMeta, *, may_lack: bool) -> None:
    """A scale of activations, found by calibration."""
    if not (0 < value < math.inf or (may_lack and value == 0)):
        raise LoadError(
            f"{meta.file}: tensor {meta.name!r} is {value:g}, expected a positive number; nothing"
            " was calibrated, or the checkpoint is damaged (--weights-only loads it without)"
        )


def _check_shape(tensor: Tensor, meta: TensorMeta, site: Site) -> None:
    wanted = [site.out_features, site.in_features]
    *counts, width = tensor.tolist()  # of stacked experts: their number, rows, columns
    if [math.prod(counts), width] != wanted:
        raise LoadError(
            f"{meta.file}: tensor {meta.name!r} says that the matrix is {tensor.tolist()},"
            f" the model needs {wanted}; config.json and weights do not belong together"
        )
