"""Where MLX stores otherwise: experts stacked by projection, convolutions with channels last.

Some converted files have convolutions as upstream has them, so their shapes decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from cabochon.checkpoint.headers import TensorMeta
from cabochon.load.names import Named, canonical
from cabochon.load.transforms import shape_after

_STACKED = re.compile(r"(.+\.experts)\.switch_glu\.((?:gate|up|down)_proj\..+)")


def read(meta: TensorMeta, shapes: Mapping[str, tuple[int, ...]], experts: int) -> Iterator[Named]:
    """What is in `meta`, under the model's names.

    Args:
        shapes: of the parameters that the model needs, by name.
        experts: how many there are; a stack of more, or of none, has no place.
    """
    name = canonical(meta.name)
    stacked = _STACKED.fullmatch(name)
    if stacked is not None and len(meta.shape) == 3 and 0 < meta.shape[0] <= experts:
        module, leaf = stacked.groups()
        for number, slice_ in enumerate(_slices(meta)):
            yield Named(f"{module}.{number}.{leaf}", slice_)
        return
    wanted = shapes.get(name)
    if wanted is not None and len(wanted) > 2 and meta.shape != wanted:
        turned = shape_after("taps first", meta.shape)
        if turned == wanted:
            yield Named(name, replace(meta, shape=turned), "taps first")
            return
    yield Named(name, meta)


def _slices(meta: TensorMeta) -> Iterator[TensorMeta]:
    """Each of the matrices stacked in `meta`, by its own bytes."""
    count, *shape = meta.shape
    each, start = meta.nbytes // count, meta.span[0]
    for number in range(count):
        begin = start + number * each
        yield replace(meta, shape=tuple(shape), span=(begin, begin + each))
