"""ModelOpt as an oracle: transformers' model of its matrices, whose inputs its quantizers round.

ModelOpt (0.47.0) does not run beside these tests' other packages. What it does to activations is
stated here from its sources, `fp8_eager` and `NVFP4QTensor`, and its own digests of what it rounds
some numbers to hold these statements to it, bit by bit (`fixtures/make_modelopt.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import Tensors, config_of, load_model, tensors_of
from guided import seam
from torch import Tensor
from torch.nn.functional import linear
from upstream import Experts, reference, stacked

from cabochon.load.plan import SiteRead
from cabochon.nn.activations import RoundedWeight
from cabochon.nn.smoothed import CorrectedWeight, SmoothedWeight
from cabochon.nn.weight import Weight

EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj")
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # of E2M1
CALIBRATED = re.compile(r".+_proj\.[kv]_scale")  # the cache's

Rounding = Callable[[Tensor], Tensor]


def fp8(x: Tensor, largest: Tensor) -> Tensor:
    scale = 448 / torch.where(largest <= 2**-24, torch.ones(()), largest)
    codes = (x * scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.float() * (1 / scale)


def fp4(x: Tensor, scale: Tensor) -> Tensor:
    blocks = x.unflatten(-1, (-1, 16))
    shares = blocks.abs().amax(dim=-1, keepdim=True) / (6 * scale)
    shares = shares.masked_fill(shares == 0, 1).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    shares = shares.float() * scale
    steps = blocks / shares
    borders = (VALUES[1:] + VALUES[:-1]) / 2
    codes = torch.bucketize(steps.abs(), borders)
    codes += (steps.abs()[..., None] == borders[1::2]).any(dim=-1)  # half way: to the even code
    return (VALUES[codes] * steps.sign() * shares).flatten(-2)


def rounding_of(parts: Tensors, algorithm: str) -> Rounding:
    """What ModelOpt does to the inputs of the matrix whose tensors are `parts`."""
    scale = parts.get("input_scale")
    if scale is None and "PER_TOKEN" not in algorithm:
        return unrounded
    if scale is None:
        return lambda x: fp8(x, x.abs().amax(dim=-1, keepdim=True))
    if parts["weight_scale"].dtype is torch.float8_e4m3fn:
        return partial(fp4, scale=scale)
    return partial(fp8, largest=448 * scale)


def unrounded(x: Tensor) -> Tensor:
    return x


def numbers(width: int) -> Tensor:
    """What ModelOpt's digests are of, rounded: the same wherever it is made."""
    counted = (torch.arange(16 * width) * 7919 % 4001 - 2000).view(16, width) / 512
    counted[0] = 0
    return torch.ldexp(counted, 2 * torch.arange(16)[:, None] - 26)  # of many sizes


def parts_of(folder: Path) -> dict[str, Tensors]:
    """The tensors of each quantized matrix by leaf."""
    stored = tensors_of(folder)
    modules = [n.removesuffix(".weight_scale") for n in stored if n.endswith(".weight_scale")]
    return {
        module: {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in stored.items()
            if name.startswith(f"{module}.")
        }
        for module in modules
    }


def matrix(model: torch.nn.Module, read: SiteRead) -> Weight:
    """The matrix that `read` stores, as it is stored."""
    weight = _within(model, read)
    return weight.weight if isinstance(weight, RoundedWeight) else weight


def inputs_of(model: torch.nn.Module, read: SiteRead) -> Rounding:
    """What our model does to that matrix's inputs."""
    weight = _within(model, read)
    return weight.inputs if isinstance(weight, RoundedWeight) else unrounded


def _within(model: torch.nn.Module, read: SiteRead) -> Weight:
    whole = model.get_submodule(read.site.name).weight
    weight = whole if read.part is None else whole.parts[read.part]
    while isinstance(weight, SmoothedWeight | CorrectedWeight):
        weight = weight.inner
    return weight


def oracle(folder: Path, scratch: Path) -> Any:
    """transformers' model with the matrices of `folder`: ModelOpt's, as other tests see."""
    made, report = load_model(folder, dtype=torch.float32)
    parts = parts_of(folder)
    matrices = {
        read.stored["weight"].name.removesuffix(".weight"): matrix(made, read).dense(torch.float32)
        for read in report.plan.sites
        if "weight_scale" in read.stored
    }
    dense = {
        name: tensor
        for name, tensor in tensors_of(folder).items()
        if not any(name.startswith(f"{module}.") for module in matrices)
        and not CALIBRATED.fullmatch(name)
    }
    dense |= {f"{module}.weight": tensor for module, tensor in matrices.items()}
    model = reference(folder, stacked(dense), scratch)
    algorithm = config_of(folder)["quantization_config"]["quant_algo"]
    experts: dict[str, dict[tuple[int, str], Any]] = {}
    for module, leaves in parts.items():
        product = layer(module, leaves, matrices[module], rounding_of(leaves, algorithm))
        expert = EXPERT.fullmatch(module)
        if expert is None:
            model.get_submodule(module).forward = product
        else:
            experts.setdefault(expert[1], {})[int(expert[2]), expert[3]] = product
    for name, layers in experts.items():
        module = model.get_submodule(name)
        module.forward = Experts(module.act_fn, layers)
    return model


def layer(name: str, parts: Tensors, dense: Tensor, inputs: Rounding) -> Rounding:
    """A quantized layer as ModelOpt's modules compute it."""

    def forward(x: Tensor) -> Tensor:
        if "pre_quant_scale" in parts:
            x = x * parts["pre_quant_scale"].float()
        y = linear(x if inputs is unrounded else inputs(seam(f"{name}.inputs", x)), dense)
        if "weight_quantizer._svdquant_lora_a" in parts:
            down = parts["weight_quantizer._svdquant_lora_a"].float()
            y = y + linear(linear(x, down), parts["weight_quantizer._svdquant_lora_b"].float())
        return y

    return forward
