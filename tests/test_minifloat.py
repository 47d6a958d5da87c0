"""The tables of small floats, and rounding to them, are those of torch and compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from torch import Tensor

from cabochon.nn.minifloat import E2M1_PAIRS, E4M3, E5M2, E8M0, round_e2m1, round_e4m3

BYTES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("table", "dtype"),
    [
        (E4M3, torch.float8_e4m3fn),
        (E5M2, torch.float8_e5m2),
        (E8M0, torch.float8_e8m0fnu),
    ],
)
def test_tables_of_8_bits_are_torchs(table: Tensor, dtype: torch.dtype) -> None:
    theirs = BYTES.view(dtype).float()
    torch.testing.assert_close(table, theirs, rtol=0, atol=0, equal_nan=True)


def test_powers_of_two_are_compressed_tensors() -> None:
    assert torch.equal(E8M0[1:255], decompress_mx_scale(BYTES[1:255]).float())


def test_the_table_of_4_bits_is_compressed_tensors() -> None:
    """The even column is in the low half of a byte."""
    theirs = unpack_fp4_from_uint8(BYTES[:, None], 256, 2, dtype=torch.float32)
    assert torch.equal(E2M1_PAIRS, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_to_4_bits_is_compressed_tensors(dtype: torch.dtype) -> None:
    x = torch.linspace(-6, 6, 24 * 64 + 1).to(dtype)  # every tie among them
    assert torch.equal(round_e2m1(x), FP4_E2M1_DATA.cast_to_fp4(x.clone()))


def test_rounding_to_8_bits_takes_the_nearest() -> None:
    x = torch.cat((torch.linspace(-448, 448, 10_001), torch.randn(10_000) * 0.02))
    finite = E4M3[~E4M3.isnan()].unique()
    nearest = (x[:, None] - finite).abs().amin(dim=1)
    assert torch.equal((round_e4m3(x) - x).abs(), nearest)
