"""Dense streams of codes against numpy's bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.nn.bits import pack, unpack, words_of
from cabochon.nn.packed_int import PackedIntWeight
from cabochon.nn.permuted import Permuted


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[rows, count]` as bytes, entry after entry, low bits first."""
    single = codes[:, :, None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(single.reshape(len(codes), -1), axis=1, bitorder="little")


@settings(max_examples=80, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(1, 90), seed=st.integers(0, 999))
def test_streams(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, count), dtype=np.uint8)
    octets = torch.from_numpy(stream(codes, bits))
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.shape == (3, -(-count * bits // 32))
    assert torch.equal(packed, words_of(octets))
    assert torch.equal(unpack(packed.view(torch.uint8), bits, count), torch.from_numpy(codes))
    assert torch.equal(unpack(octets, bits, count), torch.from_numpy(codes))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_columns_in_another_order(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, (5, 64), generator=generator).byte()
    scales = torch.rand(5, 2, generator=generator)
    order = torch.randperm(64, generator=generator)
    inner = PackedIntWeight(pack(codes, bits), scales, None, in_features=64, bits=bits, group=32)
    weight = Permuted(inner, order)
    stored = (codes.float() - (1 << (bits - 1))) * scales.repeat_interleave(32, 1)
    expected = torch.empty(5, 64)
    expected[:, order] = stored
    assert torch.equal(weight.dense(torch.float32), expected)
    assert torch.equal(weight.dense(torch.float32, 1, 3), expected[1:3])
    assert torch.equal(weight.rows(torch.tensor([[4, 0]]), torch.float32), expected[[4, 0]][None])
    x = torch.randn(3, 64, generator=generator)
    torch.testing.assert_close(weight.linear(x), x @ expected.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.linear(x, 1, 4), x @ expected[1:4].T, rtol=1e-5, atol=1e-5)
