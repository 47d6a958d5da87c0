"""Checkpoints encoded by compressed-tensors' own compressors, where the tests run.

What llm-compressor adds is the search for scales; here they follow from the largest entries, by
compressed-tensors' own formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from checkpoints import Config, Tensors, altered
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    generate_gparam,
    maybe_pad_tensor_for_block_quant,
)
from torch import Tensor, nn

TARGET = r"re:.*language_model\.layers\..*(_proj|per_layer_input_gate|per_layer_projection)$"
INPUTS = 8.0  # the largest activation, where a recipe wants it calibrated


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
    inputs = scheme.input_activations
    if inputs is not None and inputs.strategy == "tensor_group":
        made["input_global_scale"] = torch.tensor([448 * 6 / INPUTS])
    elif inputs is not None and not inputs.dynamic:
        made["input_scale"] = torch.tensor([INPUTS / 127])
    return made


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


def encode(folder: Path, source: Path, scheme: QuantizationScheme) -> Path:
    """The checkpoint in `source`, the linear layers of whose text model are in `scheme`."""

    def tensors(stored: Tensors) -> None:
        for name in [n for n in stored if "language_model.layers." in n]:
            for module, weight in matrices(name, stored[name]):
                stored.pop(name, None)
                made = compress(weight, scheme)
                stored.update({f"{module}.{leaf}": tensor for leaf, tensor in made.items()})

    def config(described: Config) -> None:
        group = scheme.model_dump(mode="json") | {"targets": [TARGET], "format": form_of(scheme)}
        described["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": form_of(scheme),
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
            "version": "0.20.0",
        }

    return altered(folder, source, tensors, config)


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
