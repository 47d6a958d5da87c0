"""Checkpoints encoded by compressed-tensors' own compressors, where the tests run.

What llm-compressor adds is the search for scales; here they follow from the largest entries, by
compressed-tensors' own formula.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from checkpoints import Config, Tensors, altered
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    generate_gparam,
    maybe_pad_tensor_for_block_quant,
)
from torch import Tensor, nn

LAYERS = r"re:.*language_model\.layers\..*(_proj|per_layer_input_gate|per_layer_projection)$"
Packing = Literal["now", "0.17", "0.17, reordered"]
INPUTS = 2.0  # the largest activation that calibration saw; some are larger, and are clipped


def compress(weight: Tensor, scheme: QuantizationScheme) -> Tensors:
    """The tensors of one matrix by leaf."""
    arguments = scheme.weights
    assert arguments is not None
    low, high = (end.float() for end in extremes(weight, arguments))
    state = {"weight": weight}
    whole = None
    if arguments.strategy == "tensor_group":
        whole = generate_gparam(low.min(), high.max())
        state["weight_global_scale"] = whole
    scale, zero = calculate_qparams(low, high, arguments, global_scale=whole)
    state["weight_scale"] = scale if whole is not None else scale.to(weight.dtype)
    if not arguments.symmetric:
        state["weight_zero_point"] = zero
    made: Tensors = BaseCompressor.get_value_from_registry(form_of(scheme)).compress(state, scheme)
    for end in ("input", "output"):
        made |= calibrated(end, getattr(scheme, f"{end}_activations"))
    return made


def calibrated(end: str, arguments: QuantizationArgs | None) -> Tensors:
    """What is stored of the activations that go in, or come out."""
    if arguments is not None and arguments.strategy == "tensor_group":
        return {f"{end}_global_scale": torch.tensor([448 * 6 / INPUTS])}
    if arguments is None or arguments.dynamic:
        return {}
    if not arguments.symmetric:  # rather more below zero than above
        zero = torch.tensor([20], dtype=torch.int8)
        return {f"{end}_scale": torch.tensor([INPUTS / 148]), f"{end}_zero_point": zero}
    largest = 448 if arguments.type == "float" else 127
    return {f"{end}_scale": torch.tensor([INPUTS / largest])}


def extremes(weight: Tensor, arguments: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """The least and the largest of the entries that share a scale."""
    rows, columns = weight.shape
    if arguments.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if arguments.strategy == "block":
        height, width = arguments.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, (height, width))
        cells = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2)
        return cells.amin(dim=(2, 3)), cells.amax(dim=(2, 3))
    grouped = weight.view(rows, -1, arguments.group_size or columns)
    return grouped.amin(dim=-1), grouped.amax(dim=-1)


def form_of(scheme: QuantizationScheme) -> str:
    form = scheme.format or infer_module_format(nn.Linear, scheme)
    return str(getattr(form, "value", form))


def older(weight: Tensor, scheme: QuantizationScheme, reordered: bool) -> Tensors:
    """The same as versions before 0.18 stored it: of the integers of the present one."""
    arguments = scheme.weights
    assert arguments is not None
    bits, order = arguments.num_bits, order_of(weight, reordered)
    made = compress(weight[:, order], scheme)
    codes = unpack_from_int32(made["weight_packed"], bits, weight.shape)[:, order.argsort()]
    made["weight_packed"] = padded(codes, bits)
    if "weight_zero_point" in made:
        shape = made["weight_scale"].shape
        zeros = unpack_from_int32(made["weight_zero_point"], bits, shape, packed_dim=0)
        made["weight_zero_point"] = padded(zeros.T, bits).T
    if reordered:
        made["weight_g_idx"] = (order.argsort() // arguments.group_size).int()
    return made


def order_of(weight: Tensor, reordered: bool) -> Tensor:
    """The order in which columns of `weight` are grouped."""
    columns = weight.shape[1]
    if not reordered:
        return torch.arange(columns)
    return torch.randperm(columns, generator=torch.Generator().manual_seed(columns))


def padded(codes: Tensor, bits: int) -> Tensor:
    """Signed integers `[rows, n]` in words, each of which holds as many as go into it whole."""
    each = 32 // bits
    unsigned = codes.long() + (1 << bits - 1)
    unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % each))
    shifts = torch.arange(0, each * bits, bits)
    words = (unsigned.unflatten(1, (-1, each)) << shifts).sum(dim=2)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).int()


def encode(
    folder: Path,
    source: Path,
    groups: Mapping[str, QuantizationScheme],
    packing: Packing = "now",
) -> Path:
    """The checkpoint in `source`, its matrices in the schemes of the groups that they belong to."""

    used: dict[str, QuantizationScheme] = {}
    reordered = packing == "0.17, reordered"
    store = compress if packing == "now" else partial(older, reordered=reordered)

    def tensors(stored: Tensors) -> None:
        if "lm_head" in groups:
            table = stored["model.language_model.embed_tokens.weight"]
            stored["lm_head.weight"] = table.clone()
        for name in list(stored):
            for module, weight in matrices(name, stored[name]):
                for target in [target for target in groups if belongs(module, target)]:
                    used[target] = groups[target]
                    stored.pop(name, None)
                    made = store(weight, used[target])
                    stored.update({f"{module}.{leaf}": tensor for leaf, tensor in made.items()})

    def config(described: Config) -> None:
        said = {
            f"group_{number}": scheme.model_dump(mode="json")
            | {"targets": [target], "format": form_of(scheme)}
            for number, (target, scheme) in enumerate(used.items())
        }
        for group in said.values() if reordered else ():
            group["weights"]["actorder"] = "group"
        forms = {group["format"] for group in said.values()}
        described["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": forms.pop() if len(forms) == 1 else "mixed-precision",
            "config_groups": said,
            "ignore": [] if "lm_head" in groups else ["lm_head"],
            "version": "0.20.0" if packing == "now" else "0.17.0",
        }
        if "lm_head" in groups:
            described["tie_word_embeddings"] = False
            described["text_config"]["tie_word_embeddings"] = False

    return altered(folder, source, tensors, config)


def belongs(module: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return module == target


def matrices(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The linear layers that a tensor is: experts one by one, as upstream unfolds them."""
    module, _, leaf = name.rpartition(".")
    if tensor.ndim == 3:
        for number, stacked in enumerate(tensor):
            kinds = ("gate", "up") if leaf == "gate_up_proj" else ("down",)
            for kind, part in zip(kinds, stacked.chunk(len(kinds)), strict=True):
                yield f"{module}.{number}.{kind}_proj", part.contiguous()
    elif tensor.ndim == 2 and ".router." not in name:
        yield module, tensor
