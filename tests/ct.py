"""compressed-tensors as an oracle: its decompression of a checkpoint, its rounding of activations.

transformers runs the dense copy, each of whose layers is one that compressed-tensors simulates.
"""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints import Tensors, config_of, tensors_of
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
    initialize_module_for_quantization,
)
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.utils.match import is_match, match_targets
from guided import rounds
from torch import Tensor, nn
from upstream import Experts, reference

WEIGHT = re.compile(r"(.+)\.(weight_\w+|weight)")
ENDS = re.compile(r"(.+)\.((?:input|output)_(?:scale|zero_point|global_scale))")
# The recipes of experts, by number and kind, and what calibration found.
Parts = dict[tuple[int, str], tuple[QuantizationScheme, Tensors]]
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj")


class Claims:
    """Which scheme each module of a checkpoint has, by compressed-tensors' own matching."""

    def __init__(self, folder: Path) -> None:
        config = config_of(folder)["quantization_config"]
        self.ignore = config["ignore"]
        self.targets = {
            target: QuantizationScheme.model_validate(group)
            for group in config["config_groups"].values()
            for target in group["targets"]
        }

    def scheme(self, module: str) -> QuantizationScheme | None:
        kind = nn.Embedding(1, 1) if "embed_tokens" in module else nn.Linear(1, 1)
        if is_match(module, kind, self.ignore):
            return None
        matches = match_targets(module, kind, self.targets)
        return self.targets[matches[0]] if matches else None


def decompress(parts: Tensors, scheme: QuantizationScheme) -> Tensor:
    form = scheme.format or infer_module_format(nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(form)
    decompressed: Tensor = compressor.decompress(parts, scheme)["weight"]
    return decompressed


def modules_of(folder: Path) -> dict[str, Tensors]:
    """The tensors of each quantized matrix by leaf."""
    modules: dict[str, Tensors] = {}
    for name, tensor in tensors_of(folder).items():
        match = WEIGHT.fullmatch(name)
        if match is not None:
            modules.setdefault(match[1], {})[match[2]] = tensor
    return {name: parts for name, parts in modules.items() if len(parts) > 1}


def decompressed(folder: Path) -> Tensors:
    """Every matrix of the checkpoint dense, as compressed-tensors makes it."""
    claims, modules = Claims(folder), modules_of(folder)
    dense = {
        name: tensor
        for name, tensor in tensors_of(folder).items()
        if not ENDS.fullmatch(name)
        and not ((match := WEIGHT.fullmatch(name)) and match[1] in modules)
    }
    for module, parts in modules.items():
        scheme = claims.scheme(module)
        assert scheme is not None, module
        dense[f"{module}.weight"] = decompress(parts, scheme)
    return dense


def oracle(folder: Path, scratch: Path) -> Any:
    """transformers' model of the decompressed weights, whose layers round activations."""
    return rounding(reference(folder, decompressed(folder), scratch), folder)


def rounding(model: Any, folder: Path) -> Any:
    """`model`, each of whose layers rounds activations as the recipe of `folder` has it."""
    ends: dict[str, Tensors] = {}
    for name, tensor in tensors_of(folder).items():
        match = ENDS.fullmatch(name)
        if match is not None:
            ends.setdefault(match[1], {})[match[2]] = tensor
    claims = Claims(folder)
    experts: dict[str, Parts] = {}
    layers = layers_of(model)
    for module in modules_of(folder):
        scheme = claims.scheme(module)
        assert scheme is not None
        recipe = scheme, ends.get(module, {})
        expert = EXPERT.fullmatch(module)
        if expert is not None:
            experts.setdefault(expert[1], {})[int(expert[2]), expert[3]] = recipe
        elif isinstance(layers[module], nn.Linear):
            simulate(module, layers[module], *recipe)
    for name, parts in experts.items():
        one_by_one = {
            key: unfolded(name, layers[name], key, *recipe) for key, recipe in parts.items()
        }
        layers[name].forward = Experts(layers[name].act_fn, one_by_one)
    return model


def decompressed_into(model: Any, folder: Path) -> Any:
    """A copy of `model`, the dense one of `folder`, with the decompressed weights."""
    model = copy.deepcopy(model)
    claims, layers = Claims(folder), layers_of(model)
    for module, parts in modules_of(folder).items():
        scheme = claims.scheme(module)
        assert scheme is not None
        dense = decompress(parts, scheme).float()
        expert = EXPERT.fullmatch(module)
        if expert is None:
            layers[module].weight.data = dense
        elif expert[3] == "down":
            layers[expert[1]].down_proj.data[int(expert[2])] = dense
        else:
            fused = layers[expert[1]].gate_up_proj.data[int(expert[2])]
            fused.chunk(2)[expert[3] == "up"].copy_(dense)
    return model


def layers_of(model: Any) -> dict[str, Any]:
    """The modules of transformers' `model` by the names of their tensors in checkpoints."""
    return {on_disk(name, model): module for name, module in model.named_modules()}


def on_disk(name: str, model: Any) -> str:
    """A module of the encoder-free model by the name that its tensors have in checkpoints."""
    if "unified" in model.config.model_type:
        name = re.sub(r"^model\.embed_vision\.(?!multimodal)", "model.vision_embedder.", name)
        name = name.replace("model.embed_vision.multimodal_embedder", "model.embed_vision")
    return name


def unfolded(
    name: str, stacked: Any, key: tuple[int, str], scheme: QuantizationScheme, ends: Tensors
) -> nn.Linear:
    """One of the layers as which upstream unfolds experts, rounding its activations."""
    number, kind = key
    weight = (stacked.down_proj if kind == "down" else stacked.gate_up_proj).data[number]
    if kind != "down":
        weight = weight.chunk(2)[kind == "up"]
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    simulate(f"{name}.{number}.{kind}_proj", layer, scheme, ends)
    return layer


def simulate(name: str, module: Any, scheme: QuantizationScheme, ends: Tensors) -> None:
    """`module` rounds what goes in and out as compressed-tensors simulates it."""
    given = {
        end: fitted(arguments, module.in_features)
        for end in ("input", "output")
        if (arguments := getattr(scheme, f"{end}_activations")) is not None
        # Google's files say so that an end was not calibrated, and is not rounded.
        and not (f"{end}_scale" in ends and not ends[f"{end}_scale"].any())
    }
    initialize_module_for_quantization(
        module,
        QuantizationScheme(
            targets=["Linear"], **{f"{end}_activations": given[end] for end in given}
        ),
        force_zero_point=False,
    )
    for leaf, tensor in ends.items():
        if leaf.partition("_")[0] in given:
            exact = tensor if leaf.endswith("zero_point") else tensor.float()
            getattr(module, leaf).data = exact
    module.quantization_status = QuantizationStatus.COMPRESSED
    inputs, outputs = (
        partial(simulated, module, end, given[end]) if end in given else None
        for end in ("input", "output")
    )
    module.forward = rounds(name, partial(nn.Linear.forward, module), inputs, outputs)


def simulated(module: Any, end: str, arguments: QuantizationArgs, x: Tensor) -> Tensor:
    """Upstream has a scale a token only in a batch of sequences, which not all layers get."""
    rounded: Tensor = forward_quantize(module, x.reshape(1, -1, x.shape[-1]), end, arguments)
    return rounded.view(x.shape)


def fitted(arguments: QuantizationArgs, width: int) -> QuantizationArgs:
    """Upstream asks for whole groups; of a row that is shorter than one, all share a scale."""
    if arguments.group_size is None or width >= arguments.group_size:
        return arguments
    return arguments.model_copy(update={"group_size": width})
