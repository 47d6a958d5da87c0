"""Unsigned codes of one to eight bits in dense streams: entry i of a row begins at bit `i * bits`.

Low bits come first, and entries may straddle bytes and words. Eight entries fill `bits` bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unpack(octets: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row: uint8 `[rows, n]` to uint8 `[rows, count]`."""
    rows = len(octets)
    if bits == 8:
        return octets[:, :count]
    if bits in (1, 2, 4):  # no entry straddles two bytes
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=octets.device)
        codes = octets[:, :, None] >> shifts & ((1 << bits) - 1)
        return codes.view(rows, -1)[:, :count]
    groups = _padded(octets, bits).view(rows, -1, bits)
    codes = torch.empty(rows, groups.shape[1], 8, dtype=torch.uint8, device=octets.device)
    for entry in range(8):
        byte, shift = divmod(entry * bits, 8)
        code = groups[:, :, byte] >> shift
        if shift + bits > 8:
            code = code | groups[:, :, byte + 1] << (8 - shift)
        codes[:, :, entry] = code & ((1 << bits) - 1)
    return codes.view(rows, -1)[:, :count]


def pack(codes: Tensor, bits: int) -> Tensor:
    """The inverse in int32 words: uint8 `[rows, count]` to `[rows, ceil(count * bits / 32)]`.

    What is left of the last word is zeros.
    """
    rows, count = codes.shape
    entries = _padded(codes, 32).view(rows, -1, 8)  # 32 entries fill `bits` words
    groups = torch.zeros(rows, entries.shape[1], bits, dtype=torch.uint8, device=codes.device)
    for entry in range(8):
        byte, shift = divmod(entry * bits, 8)
        groups[:, :, byte] |= entries[:, :, entry] << shift
        if shift + bits > 8:
            groups[:, :, byte + 1] |= entries[:, :, entry] >> (8 - shift)
    words = groups.view(rows, -1).view(torch.int32)
    return words[:, : -(-count * bits // 32)].contiguous()


def words_of(octets: Tensor) -> Tensor:
    """The same bits in int32 words: uint8 `[rows, n]` to `[rows, ceil(n / 4)]`."""
    return _padded(octets, 4).contiguous().view(torch.int32)


def _padded(rows: Tensor, multiple: int) -> Tensor:
    lacking = -rows.shape[1] % multiple
    return F.pad(rows, (0, lacking)) if lacking else rows
