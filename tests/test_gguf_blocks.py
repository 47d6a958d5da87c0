"""ggml's blocks: every kind decodes as gguf-py decodes it, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

from cabochon.checkpoint.gguf import BLOCKS
from cabochon.kernels.choose import Kernels
from cabochon.kernels.library import library
from cabochon.kernels.packed import PackedWeight
from cabochon.nn.gguf_blocks import BlockWeight, damaged, decode

KINDS = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4",
)  # fmt: skip

WIDTH = 768  # entries of a row: several blocks of every kind
# Where a block keeps its 16-bit floats, so that random ones can be made finite.
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82)}
HALVES |= {"Q3_K": (108,), "Q6_K": (208,), "MXFP4": (), "NVFP4": ()}


def random_rows(kind: str, rows: int = 40) -> np.ndarray:
    """Every bit random but for scales, which are ordinary numbers: `[rows, bytes]`."""
    rng = np.random.default_rng(len(kind) + 7)
    entries, nbytes = BLOCKS[kind]
    blocks = rng.integers(0, 256, (rows * WIDTH // entries, nbytes), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        scales = rng.normal(0, 0.01, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(100, 130, len(blocks))
    if kind == "NVFP4":
        blocks[:, :4] = rng.integers(0, 127, (len(blocks), 4))
    return blocks.reshape(rows, -1)


def expected(rows: np.ndarray, kind: str) -> np.ndarray:
    return quants.dequantize(rows, gguf.GGMLQuantizationType[kind])


def test_sizes_of_blocks_are_those_of_gguf() -> None:
    theirs = {kind.name: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    for kind, sizes in BLOCKS.items():
        assert theirs.get(kind, sizes) == sizes
    assert set(KINDS) <= set(theirs)


@pytest.mark.parametrize(("kind", "scales"), [("MXFP4", 253), ("NVFP4", 127)])
def test_every_scale_of_eight_bits(kind: str, scales: int) -> None:
    entries, nbytes = BLOCKS[kind]
    blocks = np.random.default_rng(1).integers(0, 256, (scales, nbytes), dtype=np.uint8)
    blocks[:, : nbytes - entries // 2] = np.arange(scales)[:, None]
    assert damaged(torch.from_numpy(blocks), kind) == 0
    assert np.array_equal(decode(torch.from_numpy(blocks), kind).numpy(), expected(blocks, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_decodes_as_gguf_does(kind: str) -> None:
    rows = random_rows(kind)
    weight = BlockWeight(torch.from_numpy(rows), kind, in_features=WIDTH)
    theirs = torch.from_numpy(expected(rows, kind).astype(np.float32))
    assert theirs.abs().max() > 0
    assert torch.equal(weight.dense(torch.float32), theirs)
    assert torch.equal(weight.dense(torch.float32, 3, 17), theirs[3:17])
    ids = torch.tensor([[5, 0], [39, 5]])
    assert torch.equal(weight.rows(ids, torch.float32), theirs[ids])
    assert torch.equal(weight.dense(torch.bfloat16), theirs.bfloat16())
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(weight.linear(x), x @ theirs.T)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_decodes_what_gguf_wrote(kind: str) -> None:
    """Not random bytes but numbers that gguf-py quantized: what comes back is near them."""
    values = np.random.default_rng(3).normal(0, 0.05, (8, WIDTH)).astype(np.float32)
    rows = quants.quantize(values, gguf.GGMLQuantizationType[kind])
    decoded = decode(torch.from_numpy(rows).view(-1, BLOCKS[kind][1]), kind).view(8, WIDTH)
    assert np.array_equal(decoded.numpy(), expected(rows, kind))
    assert np.abs(decoded.numpy() - values).mean() < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_order_of_nibbles_would_be_seen(kind: str) -> None:
    rows = random_rows(kind)
    swapped = (rows >> 4) | (rows << 4)
    swapped_back = BlockWeight(torch.from_numpy(swapped), kind, in_features=WIDTH)
    assert not np.array_equal(swapped_back.dense(torch.float32).numpy(), expected(rows, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_scales_that_are_no_numbers_are_counted(kind: str) -> None:
    blocks = torch.from_numpy(random_rows(kind)).view(-1, BLOCKS[kind][1]).clone()
    assert damaged(blocks, kind) == 0
    if kind == "MXFP4":
        blocks[5, 0] = 255
    elif kind == "NVFP4":
        blocks[5, 3] = 127
    else:
        at = HALVES.get(kind, (0,))[-1]
        blocks[5, at : at + 2] = torch.tensor([0, 0x7C])  # infinity
    assert damaged(blocks, kind) == 1


def test_a_factor_multiplies() -> None:
    rows = random_rows("NVFP4")
    factor = torch.tensor(0.37)
    weight = BlockWeight(torch.from_numpy(rows), "NVFP4", factor, in_features=WIDTH)
    theirs = torch.from_numpy(expected(rows, "NVFP4").astype(np.float32)) * factor
    torch.testing.assert_close(weight.dense(torch.float32), theirs, rtol=2e-7, atol=0)


@pytest.mark.skipif(library() is None, reason="no C++ compiler where it was installed")
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compute_the_same(kind: str) -> None:
    """What a block says of itself is enough for the kernels to decode it, bit for bit."""
    rows = random_rows(kind)
    factor = torch.tensor(0.37) if kind == "NVFP4" else None
    weight = BlockWeight(torch.from_numpy(rows), kind, factor, in_features=WIDTH)
    dense, x = weight.dense(torch.float32), torch.randn(5, WIDTH)
    for activations, share in (("float32", 1e-5), ("int16", 1e-4), ("int8", 1e-2)):
        kernel = Kernels(library(), activations).for_weight(weight)
        assert isinstance(kernel, PackedWeight)
        assert torch.equal(kernel.dense(torch.float32), dense)
        exact = x.double() @ dense.double().T
        largest = x.abs().double() @ dense.abs().double().T  # what errors are shares of
        assert ((kernel.linear(x) - exact).abs() <= share * largest).all(), activations
