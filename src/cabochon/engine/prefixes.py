"""The names of pages: hashes over all that their keys and values follow from.

A name covers the salt of whoever asks, every token from the first on, and the content of pictures
and sounds that reach into the page, so that equal names mean equal keys and values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cabochon.engine.pool import Name, Named
from cabochon.gemma4.pictures import Picture
from cabochon.gemma4.sounds import Sound


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a medium's soft tokens lie, and what it is."""

    first: int
    last: int
    digest: bytes


def marks(media: Mapping[int, Picture | Sound]) -> tuple[Mark, ...]:
    return tuple(
        Mark(first, first + item.soft_tokens, _digest(item)) for first, item in media.items()
    )


def _digest(item: Picture | Sound) -> bytes:
    arrays = (item.patches, item.positions) if isinstance(item, Picture) else (item.features,)
    digest = hashlib.sha256(type(item).__name__.encode())
    for array in arrays:
        digest.update(repr((array.shape, array.dtype)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def root(salt: bytes) -> Name:
    """What stands before the first page."""
    return hashlib.sha256(salt).digest()


def name_page(
    before: Name, tokens: Sequence[int], first: int, last: int, media: Sequence[Mark]
) -> Named:
    """The name of a page that holds tokens `first` to `last`, behind the page `before`."""
    own = tuple(tokens[first:last])
    inside = [mark for mark in media if mark.first < last and first < mark.last]
    digest = hashlib.sha256(before)
    digest.update(np.asarray(own, dtype=np.int64).tobytes())
    for mark in inside:
        digest.update(repr((mark.first, mark.last)).encode() + mark.digest)
    return Named(digest.digest(), before, () if inside else own)
