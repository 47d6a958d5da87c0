"""Values that cannot be right end a load: each check names the tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from cabochon.checkpoint.gguf import BLOCKS
from cabochon.checkpoint.headers import TensorMeta
from cabochon.errors import LoadError
from cabochon.load.looked import Looked, kind_of
from cabochon.nn.found import POWERS
from cabochon.nn.look import FLOATS
from cabochon.quant.scheme import Site, Slot

NVFP4_MAX = 448 * 6  # the largest block scale times the largest entry

_E8M0_NAN = 255


def check_looked(
    slot: Slot, looked: Looked, parts: Iterable[Tensor], meta: TensorMeta, dtype: torch.dtype
) -> None:
    """Refuse a tensor of `slot`, all of `parts`, in which something is not finite in `dtype`.

    Raises:
        LoadError: the text names the tensor.
    """
    if looked.damaged:
        blocks = meta.nbytes // BLOCKS[meta.dtype][1]
        raise _refusal(meta, f"{looked.damaged} of {blocks} blocks whose scale is not finite")
    if not is_finite(looked.largest, dtype):
        bad = sum(_not_finite(part, kind_of(slot, meta), dtype) for part in parts)
        raise _values_refusal(meta, bad, dtype)


def check_value(slot: Slot, tensor: Tensor, meta: TensorMeta, site: Site) -> None:
    """Refuse a `tensor` of `slot` of `site` that is a number, or some, which cannot be right.

    Raises:
        LoadError: the text names the tensor.
    """
    if slot.holds == "shape":
        _check_shape(tensor, meta, site)
    elif slot.holds in ("divisor", "factor"):
        _check_global(float(tensor), meta, divides=slot.holds == "divisor")
    elif slot.holds in ("scale", "scale or none"):
        _check_scale(float(tensor), meta, may_lack=slot.holds == "scale or none")


def is_finite(value: float, dtype: torch.dtype) -> bool:
    """Whether it is a finite number when it is rounded to `dtype`."""
    return bool(torch.tensor(value).to(dtype).isfinite())


def check_finite(tensor: Tensor, meta: TensorMeta, dtype: torch.dtype) -> None:
    """Refuse floats that are not finite in `dtype`; `meta` says where they come from."""
    finite = tensor.to(dtype).isfinite()
    if not finite.all():
        raise _values_refusal(meta, finite.numel() - int(finite.sum()), dtype)


def check_order(tensor: Tensor, meta: TensorMeta) -> None:
    """Refuse integers that do not name each of `len(tensor)` things once."""
    if not torch.equal(tensor.sort().values, torch.arange(len(tensor))):
        raise LoadError(
            f"{meta.file}: tensor {meta.name!r} puts tokens in order, and does not name each of"
            f" {len(tensor):,} once: the file is damaged"
        )


def _not_finite(part: Tensor, kind: str, dtype: torch.dtype) -> int:
    octets = part.reshape(-1).view(torch.uint8)
    if kind == POWERS:
        return int((octets == _E8M0_NAN).sum())
    return int((~octets.view(FLOATS[kind]).to(dtype).isfinite()).sum())


def _values_refusal(meta: TensorMeta, bad: int, dtype: torch.dtype) -> LoadError:
    name = str(dtype).removeprefix("torch.")
    return _refusal(meta, f"{bad} of {math.prod(meta.shape)} values that are not finite in {name}")


def _refusal(meta: TensorMeta, what: str) -> LoadError:
    return LoadError(
        f"{meta.file}: tensor {meta.name!r} has {what}; the checkpoint is damaged or was made by a"
        " quantizer that failed"
    )


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
