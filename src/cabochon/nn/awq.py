"""From AutoAWQ's shuffled words to `PackedIntWeight`: the same codes in the same number of bits."""

from __future__ import annotations

import torch
from torch import Tensor

from cabochon.nn.bits import pack, unpack
from cabochon.nn.packed_int import PackedIntWeight

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each of eight neighbours lies


def weight(
    words: Tensor, zeros: Tensor, scales: Tensor, *, out_features: int, group: int
) -> PackedIntWeight:
    """The matrix of `words [in, out / 8]`, `zeros [groups, out / 8]` and `scales [groups, out]`."""
    codes = _codes(words, out_features)  # [in, out]
    return PackedIntWeight(
        pack(codes.T, 4),
        scales.T.contiguous(),
        _codes(zeros, out_features).T.contiguous(),
        in_features=len(words),
        bits=4,
        group=group,
    )


def _codes(words: Tensor, count: int) -> Tensor:
    """uint8 `[n, count]` of int32 `[n, count / 8]`, in the order of the rows of the matrix."""
    octets = words.contiguous().view(torch.uint8)
    shuffled = unpack(octets, 4, 2 * octets.shape[1]).view(len(words), -1, 8)
    return shuffled[:, :, _PLACES].flatten(1)[:, :count]
