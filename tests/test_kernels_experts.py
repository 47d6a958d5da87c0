"""Layers with experts in one call against their modules, which compute exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lone_layer import Make, attending, config, lone_layer, relative, run
from test_kernels import float4, integers, nf4

from cabochon.config import ExpertsConfig, TextConfig
from cabochon.gemma4.text import DecoderLayer
from cabochon.kernels import mixtures
from cabochon.kernels.choose import Kernels
from cabochon.kernels.library import Library, library
from cabochon.kernels.packed import PackedWeight
from cabochon.nn.byte_codes import ByteWeight
from cabochon.nn.weight import DenseWeight, Stack, Weight

found = library()
pytestmark = pytest.mark.skipif(found is None, reason="no C++ compiler where it was installed")

COUNT, CHOSEN, WIDTH, DENSE, HIDDEN = 9, 3, 192, 96, 128


def tame(weight: Weight, columns: int) -> Weight:
    """Entries of a spread that keeps products near one."""
    spread = weight.dense(torch.float32, 0, 8).std() * columns**0.5
    for name, buffer in weight.named_buffers(recurse=True):
        if name.endswith("scales") and buffer.dtype is torch.float32:
            buffer /= spread
    return weight


def int4(rows: int, columns: int) -> Weight:
    return tame(integers(rows, columns, 4, 32, torch.float32), columns)


def asymmetric(rows: int, columns: int) -> Weight:
    return tame(integers(rows, columns, 4, 32, torch.float32, symmetric=False), columns)


def octets(rows: int, columns: int) -> Weight:
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    return ByteWeight(codes, torch.rand(rows, 1) / 74 / columns**0.5, cell=(1, columns))


def nvfp4(rows: int, columns: int) -> Weight:
    weight = float4(rows, columns, 16)
    weight.levels /= weight.dense(torch.float32, 0, 8).std() * columns**0.5
    return weight


def normal4(rows: int, columns: int) -> Weight:
    return tame(nf4(rows, columns, torch.float32), columns)


def floats(rows: int, columns: int) -> Weight:
    return DenseWeight((torch.randn(rows, columns) / columns**0.5).to(torch.bfloat16))


KINDS: dict[str, Callable[[int, int], Weight]] = {
    "int4": int4,
    "int4, asymmetric": asymmetric,
    "int8": octets,
    "nvfp4": nvfp4,
    "nf4": normal4,
    "bfloat16": floats,
}
PARTS = {"tall": (1, 1), "an expert": (COUNT, COUNT), "a projection": (2 * COUNT, COUNT)}


def maker(kind: Callable[[int, int], Weight], parts: tuple[int, int]) -> Make:
    """Experts of `kind`, cut into `parts`; a router as checkpoints keep it; int4 elsewhere."""

    def make(name: str, rows: int, columns: int) -> Weight:
        if "router" in name:
            return DenseWeight(torch.randn(rows, columns))
        if "experts" not in name:
            return int4(rows, columns)
        count = parts["down" in name]
        if count == 1:
            return kind(rows, columns)
        return Stack([kind(rows // count, columns) for _ in range(count)])

    return make


def text(width: int = WIDTH, hidden: int = HIDDEN) -> TextConfig:
    layer = attending(kv_heads=1, head_dim=32, dense=DENSE)
    experts = ExpertsConfig(count=COUNT, chosen=CHOSEN, intermediate_size=width)
    return config(layer, hidden=hidden, heads=2, experts=experts)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_what_its_modules_make(kernels: Library, kind: str, parts: str) -> None:
    torch.manual_seed(0)
    lone = lone_layer(text(), maker(KINDS[kind], PARTS[parts]), kernels, "int16")
    steps = [[(0, torch.randn(n, HIDDEN))] for n in (1, 2, 19)]
    exact, made = run(lone, steps)
    assert relative(made, exact).max() < 3e-3


@pytest.mark.parametrize(("width", "hidden"), [(16, 64), (48, 208), (704, 80), (2112, 80)])
def test_odd_sizes(kernels: Library, width: int, hidden: int) -> None:
    """Of 16 and 48 rows, one expert's share a block of 32 with the next one's."""
    torch.manual_seed(1)
    lone = lone_layer(text(width, hidden), maker(int4, (1, 1)), kernels, "int16")
    exact, made = run(lone, [[(0, torch.randn(n, hidden))] for n in (5, 1)])
    assert relative(made, exact).max() < 3e-3


@pytest.mark.parametrize("parts", PARTS)
def test_experts_that_were_not_chosen_are_not_read(kernels: Library, parts: str) -> None:
    """Poison in the others does not show; it does in one that was chosen."""
    torch.manual_seed(2)
    lone = lone_layer(text(), maker(int4, PARTS[parts]), kernels, "int8")
    layer, rows, seen = lone.fused._module, torch.randn(1, HIDDEN), []
    lone.module.router.register_forward_hook(lambda *a: seen.extend(a[2][1].flatten().tolist()))
    _, before = run(lone, [[(0, rows)]])
    chosen = set(seen)
    assert len(chosen) == CHOSEN
    poison(layer, set(range(COUNT)) - chosen)
    assert torch.equal(run(lone, [[(0, rows)]])[1], before)
    poison(layer, {min(chosen)})
    assert run(lone, [[(0, rows)]])[1].isnan().any()


def poison(layer: DecoderLayer, experts: set[int]) -> None:
    """Bytes that are no numbers as scales, in all blocks that belong to `experts` alone."""
    for projection in (layer.experts.gate_up_proj, layer.experts.down_proj):
        stack, rows = projection.weight, projection.out_features // COUNT
        for expert in experts:
            if isinstance(stack, Stack):
                share = len(stack.parts) // COUNT
                for part in stack.parts[expert * share : (expert + 1) * share]:
                    assert isinstance(part, PackedWeight)
                    part.data.fill_(255)
            else:
                assert isinstance(stack, PackedWeight)
                blocks = stack.data.view(-1, stack.matrix.stride)
                blocks[-(-expert * rows // 32) : (expert + 1) * rows // 32] = 255


def test_a_mixture_that_has_no_kernel_for_a_part_stays_with_its_modules() -> None:
    assert found is not None

    def odd(rows: int, columns: int) -> Weight:  # no kernel for groups of 8
        others = [int4(rows // COUNT, columns) for _ in range(COUNT - 1)]
        return Stack([integers(rows // COUNT, columns, 4, 8, torch.float32), *others])

    layer, chooser = DecoderLayer(text(), text().layers[0]), Kernels(found, "int8")
    layer.router.proj.weight = chooser.for_weight(DenseWeight(torch.randn(COUNT, HIDDEN)))
    for kind, fits in ((odd, False), (int4, True)):
        for projection in (layer.experts.gate_up_proj, layer.experts.down_proj):
            made = kind(projection.out_features, projection.in_features)
            projection.weight = chooser.for_weight(made)
        assert mixtures.has_kernels(layer) == fits
