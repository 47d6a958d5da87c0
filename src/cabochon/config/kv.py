"""What a sequence keeps of its tokens: keys and values, by kind of layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cabochon.config.types import LayerKind, PictureSight, TextConfig

SCALE_BYTES = 4  # of a head's keys or values of one token, where these are kept in eight bits


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """Layers that keep keys and values of the same shape for equally long."""

    window: int | None  # tokens of which a sequence keeps them; None: all
    kv_heads: int
    head_dim: int
    pictures: PictureSight
    layers: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Numbers kept of one token, in all of these layers together."""
        return 2 * len(self.layers) * self.kv_heads * self.head_dim

    def token_bytes(self, width: int) -> int:
        """Bytes of one token with numbers of `width` bytes; of one byte, with their scales."""
        return kept_bytes(self.elements, self.head_dim, width)


def kv_sources(kinds: Sequence[LayerKind], shared: int) -> list[int] | None:
    """The layer whose keys and values each one uses: the last of its kind before sharing.

    None: the last `shared` layers are all, or of a kind that is not among the others.
    """
    own = len(kinds) - shared
    last = {kind: i for i, kind in enumerate(kinds[: max(own, 0)])}
    if not set(kinds) <= set(last):
        return None
    return [i if i < own else last[kind] for i, kind in enumerate(kinds)]


def kept_bytes(elements: int, head_dim: int, width: int) -> int:
    """Bytes of numbers of `width` bytes; a head's in single bytes have a scale together."""
    return elements * width + (elements // head_dim * SCALE_BYTES if width == 1 else 0)


def kept_layers(text: TextConfig) -> tuple[KeptLayers, ...]:
    """All layers with keys and values of their own; those that share another's keep nothing."""
    made: dict[tuple[int | None, int, int, PictureSight], list[int]] = {}
    for layer in text.layers:
        if not layer.shares_kv:
            key = (layer.window, layer.kv_heads, layer.head_dim, layer.pictures)
            made.setdefault(key, []).append(layer.index)
    return tuple(KeptLayers(*key, layers=tuple(layers)) for key, layers in made.items())
