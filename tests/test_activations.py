"""Activations are rounded as compressed-tensors does where it simulates a quantized layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
    initialize_module_for_quantization,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cabochon.nn.weight import DenseWeight
from cabochon.quant.activations import Dynamic, Rounded, Static

FP8 = {"num_bits": 8, "type": "float"}
FP4 = {"num_bits": 4, "type": "float"}
MX = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
E4M3 = {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}

# What is claimed, ours; upstream's words for it.
DYNAMIC: dict[str, tuple[Dynamic, dict[str, Any]]] = {
    "W8A8": (Dynamic("int8"), {"num_bits": 8, "strategy": "token"}),
    "W4A4": (Dynamic("int4"), {"num_bits": 4, "strategy": "token"}),
    "int8 asymmetric": (
        Dynamic("int8", symmetric=False),
        {"num_bits": 8, "strategy": "token", "symmetric": False},
    ),
    "FP8_DYNAMIC": (Dynamic("fp8"), FP8 | {"strategy": "token"}),
    "FP8_BLOCK": (Dynamic("fp8", 128), FP8 | {"strategy": "group", "group_size": 128}),
    "MXFP4": (Dynamic("fp4", 32, scales="e8m0"), FP4 | MX),
    "MXFP8": (Dynamic("fp8", 32, scales="e8m0"), FP8 | MX),
    "NVFP4": (
        Dynamic("fp4", 16, scales="e4m3", whole="input_global_scale"),
        FP4 | E4M3 | {"strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
    ),
}


def layer(inputs: dict[str, Any], outputs: dict[str, Any] | None, weight: Tensor) -> Any:
    """A linear layer of compressed-tensors, its weight as it is."""
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    module.weight.data = weight
    scheme = QuantizationScheme(
        targets=["Linear"],
        input_activations=QuantizationArgs(**inputs),
        output_activations=None if outputs is None else QuantizationArgs(**outputs),
    )
    initialize_module_for_quantization(module, scheme, force_zero_point=False)
    module.quantization_status = QuantizationStatus.COMPRESSED
    return module


@pytest.mark.parametrize("name", DYNAMIC)
@settings(max_examples=25, deadline=None)
@given(
    spread=st.sampled_from([1e-30, 1e-3, 1.0, 3000.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_dynamic_rounding(name: str, spread: float, dtype: torch.dtype, seed: int) -> None:
    ours, theirs = DYNAMIC[name]
    torch.manual_seed(seed)
    x = (torch.randn(6, 256) * spread).to(dtype)
    x[1], x[2, :128] = 0, 0  # a token of nothing, and groups of nothing
    x[3] = x[3].abs()  # nothing below zero
    module = layer({"dynamic": True} | theirs, None, torch.eye(256, dtype=dtype))
    stored = {}
    if ours.whole is not None:
        stored["input_global_scale"] = torch.tensor([448 * 6 / (3 * spread)])
        module.input_global_scale.data = stored["input_global_scale"]
    expected = module(x[None])[0]  # upstream makes a scale for each row of a batch of sequences
    found = Rounded(ours).around(DenseWeight(torch.eye(256, dtype=dtype)), stored).linear(x)
    assert found.dtype is dtype
    assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["int8", "int8 asymmetric", "fp8"])
def test_static_rounding(name: str, scale_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    numbers: Any = name.split()[0]
    zero = "zero_point" if "asymmetric" in name else None
    words = FP8 if numbers == "fp8" else {"num_bits": 8, "symmetric": zero is None}
    x, weight = torch.randn(5, 96), torch.randn(64, 96)
    module = layer(words, words, weight)
    stored = {}
    for end, largest in (("input", 1.5), ("output", 20.0)):
        scale = torch.tensor([largest / (448 if numbers == "fp8" else 127)])
        stored[f"{end}_scale"] = scale.to(scale_dtype)
        if zero is not None:
            stored[f"{end}_zero_point"] = torch.tensor([-17], dtype=torch.int8)
    for leaf, tensor in stored.items():
        # Upstream computes in the scale's dtype, and so must have all in the same one.
        getattr(module, leaf).data = tensor if leaf.endswith("point") else tensor.float()
    inputs, outputs = (
        Static(numbers, f"{end}_scale", zero and f"{end}_zero_point") for end in ("input", "output")
    )
    recipe = Rounded(inputs, outputs)
    assert {slot.leaf for slot in recipe.slots} == set(stored)
    found = recipe.around(DenseWeight(weight), stored)
    assert torch.equal(found.linear(x), module(x))
    assert torch.equal(found.linear(x, 16, 40), found.linear(x)[:, 16:40])
    assert torch.equal(found.dense(torch.float32), weight)
    assert torch.equal(found.rows(torch.tensor([3]), torch.float32), weight[3:4])
    assert not torch.allclose(found.linear(x), x @ weight.T, atol=0.01)


def test_a_scale_of_scales_may_be_a_reciprocal() -> None:
    x, identity = torch.randn(4, 64), DenseWeight(torch.eye(64))
    multiplies = Dynamic("fp4", 16, scales="e4m3", whole="input_scale", reciprocal=True)
    found = Rounded(multiplies).around(identity, {"input_scale": torch.tensor(2.0**-10)}).linear(x)
    divides = Rounded(DYNAMIC["NVFP4"][0])
    expected = divides.around(identity, {"input_global_scale": torch.tensor([2.0**10])}).linear(x)
    assert torch.equal(found, expected)
    assert not torch.equal(found, x)


def test_a_scale_of_nothing_leaves_activations_alone() -> None:
    x, identity = torch.randn(4, 64), DenseWeight(torch.eye(64))
    recipe = Rounded(Static("int8", "a", may_lack=True), Static("int8", "b", may_lack=True))
    nothing = {"a": torch.tensor(0.0), "b": torch.tensor(0.0)}
    assert torch.equal(recipe.around(identity, nothing).linear(x), x)


def test_a_last_group_that_is_cut_short_has_a_scale_of_its_own() -> None:
    """Upstream asks for whole groups, so each part is compared with one of its own."""
    x, recipe = torch.randn(4, 176), Rounded(Dynamic("fp8", 128))
    found = recipe.around(DenseWeight(torch.eye(176)), {}).linear(x)
    for part in (slice(0, 128), slice(128, 176)):
        whole = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
        width = part.stop - part.start
        expected = layer(whole, None, torch.eye(width))(x[None, :, part])[0]
        assert torch.equal(found[:, part], expected)


def test_names() -> None:
    assert Rounded(Dynamic("int8")).name == "int8 per token"
    assert Rounded(DYNAMIC["MXFP8"][0]).name == "fp8 g32 e8m0"
    ends = Static("int8", "a"), Static("int8", "b", "c")
    assert Rounded(*ends).name == "int8 static, outputs int8 static asymmetric"
    assert Rounded(None, ends[0]).name == "as they are, outputs int8 static"
