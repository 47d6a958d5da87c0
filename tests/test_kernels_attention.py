"""Attention over the paged cache in one call against the modules, which gather and ask PyTorch."""

from __future__ import annotations

import pytest
import torch
from lone_layer import attending, config, lone_layer, relative, run
from test_kernels import integers
from torch import Tensor

from cabochon.config import PictureSight
from cabochon.kernels.library import Library, library
from cabochon.nn.kept import Kept
from cabochon.nn.weight import Weight

found = library()
pytestmark = pytest.mark.skipif(found is None, reason="no C++ compiler where it was installed")

HIDDEN = 64
BOUNDS = {
    torch.float32: 1e-3,
    torch.float16: 2e-3,
    torch.int8: 5e-2,
}  # codes that lie between two may fall to either
Shape = tuple[int, int, int, int | None]
SHAPES: dict[str, Shape] = {  # heads, kv_heads, head_dim, window
    "sliding, 8 share": (8, 1, 256, 100),
    "full, 8 share": (16, 2, 512, None),
    "sliding, 2 share": (4, 2, 256, 33),
    "full, 3 share": (3, 1, 48, None),
    "full, 13 share": (13, 1, 32, None),
    "full, none share": (2, 2, 80, None),
}


def make(name: str, rows: int, columns: int) -> Weight:
    weight = integers(rows, columns, 4, 32, torch.float32)
    weight.scales /= weight.dense(torch.float32, 0, 8).std() * columns**0.5
    return weight


def both(
    kernels: Library,
    shape: tuple[int, int, int, int | None],
    kept: torch.dtype,
    sight: PictureSight,
) -> tuple[Tensor, Tensor]:
    heads, kv_heads, dim, window = shape
    layer = attending(kv_heads=kv_heads, head_dim=dim, window=window, sight=sight)
    lone = lone_layer(config(layer, hidden=HIDDEN, heads=heads), make, kernels, "int16")
    # Two prompts in one step, one of them longer than a tile; then both decode beside a third
    # prompt; then a chunk behind a past, long and short ones; then all decode.
    steps = [
        [(0, 70), (1, 7)],
        [(0, 1), (1, 1), (2, 23)],
        [(1, 300), (0, 9)],
        [(0, 1), (1, 1), (2, 1)],
    ]
    rows = [[(sequence, torch.randn(n, HIDDEN)) for sequence, n in step] for step in steps]
    return run(lone, rows, kept, pictures=((5, 40), (90, 99), (120, 250)))


@pytest.mark.parametrize("kept", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_what_its_modules_make(
    kernels: Library, shape: str, kept: torch.dtype
) -> None:
    torch.manual_seed(0)
    exact, made = both(kernels, SHAPES[shape], kept, "causal")
    assert relative(made, exact).max() < BOUNDS[kept]


@pytest.mark.parametrize("sight", ["window", "whole"])
def test_pictures_see_each_other(kernels: Library, sight: PictureSight) -> None:
    torch.manual_seed(1)
    causal = both(kernels, SHAPES["sliding, 8 share"], torch.float32, "causal")[0]
    torch.manual_seed(1)
    exact, made = both(kernels, SHAPES["sliding, 8 share"], torch.float32, sight)
    assert relative(causal, exact).max() > 0.01
    assert relative(made, exact).max() < 1e-3


def test_eight_bits_are_off_by_half_a_step_at_most() -> None:
    torch.manual_seed(2)
    made = torch.randn(64, 2, 256) * torch.logspace(-6, 4, 64)[:, None, None]
    made[3], made[5, 1] = 0, 1e-38
    kept, slots = Kept(80, 2, 256, torch.int8, torch.device("cpu")), torch.randperm(80)[:64]
    kept.write(slots, made)
    step = made.abs().amax(-1, keepdim=True) / 127
    error = (kept.read(slots, torch.float32) - made).abs()
    assert (error <= step * 0.5001 + 1e-30).all()
    assert error[0].max() > step[0].max() * 0.4


def test_what_is_no_number_stays_none(kernels: Library) -> None:
    layer = attending(kv_heads=1, head_dim=32)
    lone = lone_layer(config(layer, hidden=HIDDEN, heads=2), make, kernels, "int8")
    for kept in BOUNDS:
        rows = torch.randn(20, HIDDEN)
        rows[10] = torch.nan
        _, made = run(lone, [[(0, rows)], [(0, torch.randn(1, HIDDEN))]], kept)
        assert made[:10].isfinite().all() or kept is torch.int8
        assert made[10:].isnan().all()
