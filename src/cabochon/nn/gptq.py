"""From GPTQ's transposed words to `PackedIntWeight`: the same codes in the same number of bits."""

from __future__ import annotations

import torch
from torch import Tensor

from cabochon.nn import bits as streams
from cabochon.nn.packed_int import PackedIntWeight
from cabochon.nn.permuted import Permuted
from cabochon.nn.weight import Weight


def zero_points(words: Tensor, bits: int, out_features: int, *, less_one: bool) -> Tensor | None:
    """Codes that stand for zero, uint8 `[out, groups]`, of int32 `[groups, n]`.

    None if each of them is the middle one.

    Args:
        less_one: what is stored is less by one. Where entries do not straddle words, GPTQModel
            subtracted it from whole words, so that a zero borrowed from its neighbour.
    """
    whole = bits in (2, 4, 8)
    if less_one and whole:
        words = words + sum(1 << shift for shift in range(0, 31, bits))
    codes = streams.unpack(words.contiguous().view(torch.uint8), bits, out_features)
    if less_one and not whole:
        codes = codes + 1 & ((1 << bits) - 1)
    if (codes == 1 << (bits - 1)).all():
        return None
    return codes.T.contiguous()


def order(groups: Tensor, group: int) -> Tensor | None:
    """Columns by their group, int64 `[in]`; None if groups are not of size `group` each.

    Args:
        groups: int32 `[in]`, the group of each column.
    """
    ranked, columns = groups.sort(stable=True)
    expected = torch.arange(len(groups), device=groups.device) // group
    return columns if torch.equal(ranked, expected.to(ranked.dtype)) else None


def weight(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    *,
    in_features: int,
    bits: int,
    group: int,
) -> Weight:
    """The matrix of int32 words `[n, out]` and scales `[groups, out]`.

    Args:
        words: at least `ceil(in * bits / 32)` rows; what is beyond is nothing.
        order: columns by their group; None: as they are.
    """
    words = words[: -(-in_features * bits // 32)].T.contiguous()
    if order is not None and torch.equal(order, torch.arange(in_features, device=order.device)):
        order = None
    if order is not None:
        codes = streams.unpack(words.view(torch.uint8), bits, in_features)
        words = streams.pack(codes[:, order], bits)
    stored = PackedIntWeight(
        words, scales.T.contiguous(), zeros, in_features=in_features, bits=bits, group=group
    )
    return stored if order is None else Permuted(stored, order)
