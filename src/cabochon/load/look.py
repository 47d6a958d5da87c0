"""What a load sees of a stored tensor, in the one pass in which it is read and hashed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cabochon.checkpoint.gguf import BLOCKS
from cabochon.checkpoint.headers import TensorMeta
from cabochon.checkpoint.mapped import pieces
from cabochon.load.looked import SAMPLE, Looked, every_of
from cabochon.nn.gguf_blocks import magnitudes
from cabochon.nn.look import plainly

# What is in the tensor that `meta` describes, looked at as `kind_of` says.
Look = Callable[[Tensor, TensorMeta, str], Looked]


@dataclass(frozen=True, slots=True)
class Scales:
    """What the scales of one matrix look like, without their signs."""

    count: int
    dead: int  # zeros: all that they stand for is zero
    largest: float
    median: float  # of those that are not zero; of a sample where they are many


def look(tensor: Tensor, meta: TensorMeta, kind: str) -> Looked:
    """What numpy sees in `tensor`, which `meta` describes."""
    return look_at(pieces(tensor, meta), meta, kind)


def look_at(parts: Iterable[Tensor], meta: TensorMeta, kind: str) -> Looked:
    """`parts` are all of the tensor that `meta` describes; but the last, multiples of 64 KiB."""
    digest, sample, blocks = hashlib.sha256(), [], 0
    count, zeros, largest, damaged = 0, 0, 0.0, 0
    for part in parts:
        octets = part.reshape(-1).view(torch.uint8)
        found = plainly(octets, kind)
        digest.update(found.hashed)
        count, zeros, damaged = count + found.numbers, zeros + found.zeros, damaged + found.damaged
        largest = found.largest if math.isnan(found.largest) else max(largest, found.largest)
        if kind in BLOCKS and not damaged:
            here = octets.view(-1, BLOCKS[kind][1])
            every = every_of(meta)
            sample.append(magnitudes(here[-blocks % every :: every], kind))
            blocks += len(here)
    joined = torch.cat(sample) if sample else None
    return Looked(digest.digest(), count, zeros, largest, damaged, joined)


def scales_of(tensor: Tensor, looked: Looked) -> Scales:
    """`tensor` holds the scales of a matrix: floats, powers of two, or blocks that have them."""
    sample = _sample_of(tensor) if looked.sample is None else looked.sample
    return Scales(looked.count, looked.zeros, looked.largest, _median(sample))


def level_of(tensor: Tensor) -> float:
    """The median magnitude of a sample of `tensor`; 0 only if all of it is zero."""
    return _median(_sample_of(tensor))


def _sample_of(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    some = flat[:: max(1, len(flat) // SAMPLE)]
    if some.dtype is torch.uint8:
        return torch.exp2(some.float() - 127)
    return some.float().abs()


def _median(sample: Tensor) -> float:
    """Of those that are not zero, by one thread: waking others for so little takes longer."""
    found = sample.flatten().numpy()
    alive = found[found > 0]
    middle = (len(alive) - 1) // 2
    return float(np.partition(alive, middle)[middle]) if len(alive) else 0.0
