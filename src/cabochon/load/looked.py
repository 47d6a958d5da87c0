"""What a load keeps of what is in a stored tensor, and what it looks for there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cabochon.checkpoint.gguf import BLOCKS
from cabochon.checkpoint.headers import TensorMeta
from cabochon.nn.found import NOTHING, POWERS
from cabochon.quant.scheme import FLOATS, Slot

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 1 << 12  # scales that a median is taken of


@dataclass(frozen=True, slots=True)
class Looked:
    """The sum of what is in the pieces of a tensor; see `nn.found.Found`."""

    digest: bytes
    count: int
    zeros: int
    largest: float
    damaged: int
    sample: Tensor | None  # of magnitudes of scales, of blocks that have them


def kind_of(slot: Slot, meta: TensorMeta) -> str:
    """What is looked at in the tensor of `slot`, as `nn.look` calls it."""
    if slot.holds == "float8 scales":
        return "F8_E4M3"
    if slot.holds in ("matrix", "scales"):
        return POWERS if meta.dtype == "U8" else meta.dtype
    return meta.dtype if slot.holds == "blocks" else NOTHING


def kind_of_parameter(meta: TensorMeta) -> str:
    """The same of the tensor of a parameter."""
    return meta.dtype if meta.dtype in FLOATS else NOTHING


def every_of(meta: TensorMeta) -> int:
    """Of how many blocks of a tensor one is in the sample."""
    return max(1, meta.nbytes // BLOCKS[meta.dtype][1] // SAMPLE)
