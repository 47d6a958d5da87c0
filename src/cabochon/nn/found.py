"""What is found in stored bytes, whoever looks at them. No torch: it may not be there yet."""

from __future__ import annotations

from typing import NamedTuple

HASHED = 1 << 16  # bytes that one sum is of

# Kinds of bytes beside those of floats and of ggml's blocks, which go by their own names.
POWERS = "F8_E8M0"  # powers of two, the largest of which is none
NOTHING = ""  # hashed alone


class Found(NamedTuple):
    """Of a piece of a tensor that begins where a sum of its hash does."""

    hashed: bytes  # what goes into the hash
    numbers: int = 0  # floats, or scales in blocks
    zeros: int = 0  # of either sign
    largest: float = 0.0  # magnitude; NaN where a float is not a number
    damaged: int = 0  # blocks with a scale that is no finite number
