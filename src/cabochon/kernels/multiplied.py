"""`Multiplied`: a matrix that kernels multiply with, of either kind, as they are told of it."""

from __future__ import annotations

import ctypes

from cabochon.kernels.floats import FloatsWeight
from cabochon.kernels.library import Linear
from cabochon.kernels.packed import PackedWeight
from cabochon.nn.weight import Weight

Multiplied = PackedWeight | FloatsWeight


def linear(weight: Weight) -> Linear:
    if isinstance(weight, PackedWeight):
        return Linear(packed=ctypes.pointer(weight.matrix))
    assert isinstance(weight, FloatsWeight)
    return Linear(rows=ctypes.pointer(weight.matrix))
