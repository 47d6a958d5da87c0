"""Attention: the seam between model and cache, and the exact path over gathered keys and values."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cabochon.config import PictureSight
from cabochon.nn.kept import Store

Spans = Sequence[tuple[int, int]]


class Access(NamedTuple):
    """Which slots of a group of layers each row of a step writes and sees.

    Row i writes to `slots[i]` and looks at positions `low[i]` to `high[i]`, end excluded, of the
    pages of 16 slots from `pages[page_at[i]]` on. Rows of a sequence follow each other.
    """

    slots: array[int]  # of 64 bits
    pages: array[int]  # of 32 bits, as the rest: of all sequences
    page_at: array[int]
    low: array[int]
    high: array[int]


class KeyValues(Protocol):
    """One step's view of the cache. The model writes keys and values and asks for attention.

    The step knows which rows belong to which sequence, how far each may look, and where its past
    lies.
    """

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store `[tokens, kv_heads, head_dim]` of every row of this step for `layer`."""
        ...

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """Attention of `[rows, heads, head_dim]` over what `layer` stored, this step included."""
        ...

    @property
    def store(self) -> Store:
        """The cache itself, for who does all of this where it lies."""
        ...

    def accesses(self) -> Sequence[Access]:
        """Which of it the rows write and see, group by group."""
        ...

    def narrow(self, rows: Sequence[int]) -> KeyValues:
        """The same step with only `rows` (sorted) asking; what is stored does not change."""
        ...


def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention without scaling, as Gemma 4 has it: its query and key norms do that.

    Args:
        queries: `[n, heads, head_dim]`.
        keys, values: `[m, kv_heads, head_dim]`; each serves `heads / kv_heads` query heads.
        mask: `[n, m]`, True where a query may look; None: everywhere.

    Returns:
        `[n, heads, head_dim]`.
    """
    out: Tensor = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        scale=1.0,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return out[0].transpose(0, 1)


def seen(
    position: int, window: int | None, sight: PictureSight, pictures: Spans = ()
) -> tuple[int, int]:
    """From where and up to where, end excluded, the query at `position` sees keys.

    `pictures` are the spans of positions, end excluded, that `sight` speaks of.
    """
    low = 0 if window is None else max(0, position - window + 1)
    high = position + 1
    if sight == "causal":
        return low, high
    for start, stop in pictures:
        if start <= position < stop:
            high = stop
            if sight == "whole":
                low = min(low, start)
    return low, high


def visible(
    queries: Sequence[int],
    keys: Tensor,
    window: int | None,
    sight: PictureSight,
    pictures: Spans = (),
) -> Tensor:
    """Which keys at positions `keys [m]` the queries at positions `queries` see: `[n, m]`."""
    ranges = [seen(position, window, sight, pictures) for position in queries]
    low, high = torch.tensor(ranges, device=keys.device).T[..., None]
    return (keys >= low) & (keys < high)
