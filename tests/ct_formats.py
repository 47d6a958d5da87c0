"""What compressed-tensors can store, as `ct_writer` has it written for each architecture."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from ct_writer import Packing

from cabochon.quant.byte_codes import ByteCodes
from cabochon.quant.microscaled import Mxfp4
from cabochon.quant.nvfp4 import Nvfp4
from cabochon.quant.packed_int import PackedInt
from cabochon.quant.scheme import Scheme

Groups = Mapping[str, QuantizationScheme]  # by what they are for

TEXT = r"re:.*language_model\.layers\..*"
STATIC: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "tensor"}
GROUPS: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}


def scheme(
    form: str | None = None,
    inputs: str | Mapping[str, Any] | None = None,
    outputs: Mapping[str, Any] | None = None,
    **weights: Any,
) -> QuantizationScheme:
    """`inputs` as a preset has them, or as is said."""
    if isinstance(inputs, str):
        given = preset_name_to_scheme(inputs, ["Linear"]).input_activations
    else:
        given = None if inputs is None else QuantizationArgs(**inputs)
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=given,
        output_activations=None if outputs is None else QuantizationArgs(**outputs),
        format=form,
    )


def integers(bits: int, group: int | None = 32, symmetric: bool = True) -> QuantizationScheme:
    size = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    return scheme("pack-quantized", num_bits=bits, symmetric=symmetric, **size)


def preset(name: str) -> QuantizationScheme:
    return preset_name_to_scheme(name, ["Linear"])


def rounded_ends(bits: int) -> QuantizationScheme:
    """As in Google's mobile recipe: what comes out is rounded as what goes in."""
    form = "int-quantized" if bits == 8 else "pack-quantized"
    return scheme(form, STATIC, STATIC, num_bits=bits, strategy="channel")


ENDS = "int8 static, outputs int8 static"

# Upstream's words, the scheme that they mean here, and what is done to inputs.
FORMATS: dict[str, tuple[QuantizationScheme, Scheme, str | None]] = {
    "W2A16": (integers(2), PackedInt(2, 32, True), None),
    "W2A16 channel": (integers(2, None), PackedInt(2, None, True), None),
    "W3A16 asymmetric": (integers(3, 32, False), PackedInt(3, 32, False), None),
    "W4A16 channel": (integers(4, None), PackedInt(4, None, True), None),
    "W6A16 channel": (integers(6, None), PackedInt(6, None, True), None),
    "W8A16 channel": (integers(8, None), PackedInt(8, None, True), None),
    "W8A8": (preset("W8A8"), ByteCodes("int8", (1, None)), "int8 per token"),
    "W8A8 static": (
        scheme(inputs=STATIC, num_bits=8, strategy="channel"),
        ByteCodes("int8", (1, None)),
        "int8 static",
    ),
    "W8A8 static, asymmetric": (
        scheme(inputs=STATIC | {"symmetric": False}, num_bits=8, strategy="channel"),
        ByteCodes("int8", (1, None)),
        "int8 static asymmetric",
    ),
    "W2A8, ends rounded": (rounded_ends(2), PackedInt(2, None, True), ENDS),
    "W4A8, ends rounded": (rounded_ends(4), PackedInt(4, None, True), ENDS),
    "W8A8, ends rounded": (rounded_ends(8), ByteCodes("int8", (1, None)), ENDS),
    "W4A8 in bytes": (
        scheme(inputs="W8A8", num_bits=4, strategy="group", group_size=32),
        ByteCodes("int8", (1, 32)),
        "int8 per token",
    ),
    "FP8 static": (preset("FP8"), ByteCodes("fp8", (None, None)), "fp8 static"),
    "FP8 channel": (preset("FP8_DYNAMIC"), ByteCodes("fp8", (1, None)), "fp8 per token"),
    "FP8 block, cut short": (
        scheme(
            inputs="FP8_DYNAMIC",
            num_bits=8,
            type="float",
            strategy="block",
            block_structure=[40, 24],
        ),
        ByteCodes("fp8", (40, 24)),
        "fp8 per token",
    ),
    "FP8 tensor": (
        scheme(inputs="FP8_DYNAMIC", num_bits=8, type="float", strategy="tensor"),
        ByteCodes("fp8", (None, None)),
        "fp8 per token",
    ),
    "NVFP4A16": (preset("NVFP4A16"), Nvfp4("compressed-tensors"), None),
    "NVFP4": (preset("NVFP4"), Nvfp4("compressed-tensors"), "fp4 g16 e4m3"),
    "MXFP4A16": (preset("MXFP4A16"), Mxfp4(), None),
    "MXFP4": (preset("MXFP4"), Mxfp4(), "fp4 g32 e8m0"),
    "MXFP8": (preset("MXFP8"), ByteCodes("mxfp8", (1, 32)), "fp8 g32 e8m0"),
    "naive, asymmetric": (
        scheme("naive-quantized", num_bits=8, strategy="group", group_size=32, symmetric=False),
        ByteCodes("int8", (1, 32), symmetric=False),
        None,
    ),
}


def by_kind(*schemes: QuantizationScheme) -> Groups:
    """Each kind of matrix in a scheme of its own, and in the first ones again; experts by layer."""
    kinds = ("q", "k", "v", "o", "gate", "up", "down")
    groups = {
        rf"{TEXT}(self_attn|mlp)\.{kind}_proj$": scheme
        for kind, scheme in zip(kinds, itertools.cycle(schemes), strict=False)
    }
    for layer in range(6):
        first, second = (schemes[(layer + more) % len(schemes)] for more in (0, 1))
        experts = rf"re:.*language_model\.layers\.{layer}\.experts\.\d+"
        groups |= {rf"{experts}\.(gate|up)_proj$": first, rf"{experts}\.down_proj$": second}
    return groups


def named(*names: str) -> tuple[Groups, set[str]]:
    """Those of `FORMATS` in one file, and what they are here."""
    found = {
        scheme.name if inputs is None else f"{scheme.name}, inputs {inputs}"
        for _, scheme, inputs in (FORMATS[name] for name in names)
    }
    return by_kind(*(FORMATS[name][0] for name in names)), found


LAYERS = {rf"{TEXT}(_proj|per_layer_input_gate|per_layer_projection)$": integers(4)}
TABLES = {r"re:.*embed_tokens$": integers(8, None), r"re:.*embed_tokens_per_layer$": integers(4)}
BLOCKS = scheme(
    inputs=GROUPS | {"dynamic": True},
    num_bits=8,
    type="float",
    strategy="block",
    block_structure=[64, 32],
)

# Several schemes in one file, and what they are here.
MIXED: dict[str, tuple[Groups, set[str]]] = {
    "2 to 8 bits": (
        by_kind(*(integers(bits) for bits in range(2, 9))),
        {f"int{bits} g32" for bits in range(2, 9)},
    ),
    "2 to 8 bits, asymmetric": (
        by_kind(*(integers(bits, 32, False) for bits in range(2, 9))),
        {f"int{bits} g32 asymmetric" for bits in range(2, 9)},
    ),
    "channels": named(*(f"W{bits}A16 channel" for bits in (2, 4, 6, 8))),
    "ends": named(*(f"W{bits}A8, ends rounded" for bits in (2, 4, 8))),
    "static": named("W8A8 static", "W8A8 static, asymmetric", "FP8 static"),
    # Upstream wants whole groups of activations, and rows of 192 are none of 128.
    "FP8 blocks": (
        {rf"{TEXT}(?<!down)_proj$": preset("FP8_BLOCK"), rf"{TEXT}down_proj$": BLOCKS},
        {"fp8 128x128, inputs fp8 g128", "fp8 64x32, inputs fp8 g32"},
    ),
    "FP8 attention, NVFP4 MLP": (
        {
            rf"{TEXT}self_attn\..*_proj$": preset("FP8_DYNAMIC"),
            rf"{TEXT}(mlp|experts)\..*_proj$": preset("NVFP4"),
        },
        {"fp8 channel, inputs fp8 per token", "nvfp4, inputs fp4 g16 e4m3"},
    ),
    "tables": (LAYERS | TABLES, {"int4 g32", "int8 channel"}),
    "a head": (LAYERS | {"lm_head": integers(4)}, {"int4 g32"}),
}
# Of `FORMATS`, what none of these holds.
ALONE = (
    "W8A8", "W4A8 in bytes", "FP8 channel", "FP8 block, cut short", "FP8 tensor", "NVFP4A16",
    "NVFP4", "MXFP4A16", "MXFP4", "MXFP8", "naive, asymmetric",
)  # fmt: skip


def padded(symmetric: bool) -> Groups:
    """Widths that versions before 0.18 packed otherwise."""
    return by_kind(*(integers(bits, 32, symmetric) for bits in (3, 5, 6, 7)))


# As versions before 0.18 stored it.
OLDER: dict[str, tuple[Groups, Packing]] = {
    "0.17": (padded(True), "0.17"),
    "0.17, asymmetric, reordered": (padded(False), "0.17, reordered"),
}
