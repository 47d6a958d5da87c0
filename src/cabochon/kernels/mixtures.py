"""What the kernels need to know of a layer's experts, if they can compute them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from cabochon.gemma4.text import DecoderLayer
from cabochon.kernels.floats import FloatsWeight
from cabochon.kernels.library import Experts, Linear, address
from cabochon.kernels.multiplied import Multiplied, linear
from cabochon.kernels.packed import PackedWeight
from cabochon.nn.weight import Stack, Weight


def sizes(layer: DecoderLayer) -> list[int]:
    """What must fill vectors."""
    return [layer.experts.down_proj.in_features] if layer.mixed else []


def has_kernels(layer: DecoderLayer) -> bool:
    """Whether the router has one, and all parts of each of the experts' matrices the same."""
    if not layer.mixed:
        return True
    if not isinstance(layer.router.proj.weight, Multiplied):
        return False
    for projection in (layer.experts.gate_up_proj, layer.experts.down_proj):
        kinds = {_kind(part) for part in _parts(projection.weight)}
        if len(kinds) > 1 or None in kinds:
            return False
    return True


def _kind(part: Weight) -> str | None:
    if isinstance(part, PackedWeight):
        return None if part.activations == "float32" else part.activations
    return "floats" if isinstance(part, FloatsWeight) else None


def _parts(weight: Weight) -> Sequence[Weight]:
    if not isinstance(weight, Stack):
        return [weight]
    return [part for part in weight.parts if isinstance(part, Weight)]


class Mixture:
    """The experts of `layer` as the kernels see them, and what must stay alive for that."""

    def __init__(self, layer: DecoderLayer) -> None:
        router, experts = layer.router, layer.experts
        self._alive: list[Tensor] = []
        self._gate_up = self._linears(experts.gate_up_proj.weight)
        self._down = self._linears(experts.down_proj.weight)
        self.struct = Experts(
            router=linear(router.proj.weight),
            gate_up=self._gate_up,
            down=self._down,
            router_scale=self._floats(router.scale),
            per_expert=self._floats(router.per_expert_scale),
            before=self._floats(layer.pre_feedforward_layernorm_2.weight),
            after=self._floats(layer.post_feedforward_layernorm_2.weight),
            after_mlp=self._floats(layer.post_feedforward_layernorm_1.weight),
            gate_up_rows=experts.gate_up_proj.out_features // len(self._gate_up),
            down_rows=experts.down_proj.out_features // len(self._down),
            count=experts.count,
            chosen=router.chosen,
            intermediate=experts.down_proj.in_features,
            root=router.root,
        )

    def _linears(self, weight: Weight) -> ctypes.Array[Linear]:
        parts = _parts(weight)
        return (Linear * len(parts))(*(linear(part) for part in parts))

    def _floats(self, tensor: Tensor | None) -> int | None:
        assert tensor is not None
        self._alive.append(tensor.to(torch.float32).contiguous())
        return address(self._alive[-1])
