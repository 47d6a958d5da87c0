"""Decoder layers in one call: what `gemma4.text.DecoderLayer` computes, without Python between."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from cabochon.gemma4.drafter import Drafter
from cabochon.gemma4.model import Gemma4
from cabochon.gemma4.text import DecoderLayer
from cabochon.kernels import mixtures
from cabochon.kernels.floats import FloatsWeight
from cabochon.kernels.library import Cache, Layer, Library, Step, Turn, address, threads
from cabochon.kernels.mixtures import Mixture, linear
from cabochon.kernels.packed import PackedWeight
from cabochon.nn.attention import KeyValues, Paged
from cabochon.nn.linear import Linear as Module
from cabochon.nn.norm import RMSNorm
from cabochon.nn.rotary import Rotation

WIDTH = 16  # floats of the widest vectors; sizes must be multiples

_KEPT = {torch.float32: 0, torch.float16: 1, torch.int8: 2}


def fuse(model: Gemma4 | Drafter, library: Library | None, *, exact: bool) -> str:
    """Let every layer that can be run in one call; returns what was fused, for people.

    With `exact`, none: where inputs are not rounded, sums are PyTorch's.
    """
    text = model.model.language_model
    fused: dict[int, FusedLayer] = {}
    if library is not None and not exact:
        for index, layer in enumerate(text.layers):
            assert isinstance(layer, DecoderLayer)
            if _fits(layer):
                fused[index] = FusedLayer(library, layer)
        if len(fused) == len(text.layers):
            text.together = FusedLayers(library, list(fused.values()))
    text.fused |= fused
    how = "all layers in one call" if text.together else "a layer in one call"
    return f"{len(fused)} of {len(text.layers)} layers are fused, {how}"


def _fits(layer: DecoderLayer) -> bool:
    """Whether all matrices have kernels, and all sizes fill vectors."""
    attention, mlp = layer.self_attn, layer.mlp
    sizes = [attention.q_proj.in_features, mlp.gate_proj.out_features]
    sizes += [attention.layer.head_dim, *mixtures.sizes(layer)]
    if hasattr(layer, "per_layer_input_gate"):
        sizes.append(layer.per_layer_input_gate.out_features)
    weights = [module.weight for module in _linears(layer).values()]
    known = all(isinstance(weight, PackedWeight | FloatsWeight) for weight in weights)
    whole = all(size % WIDTH == 0 for size in sizes)
    return known and whole and mixtures.has_kernels(layer)


def _linears(layer: DecoderLayer) -> dict[str, Module]:
    attention, mlp = layer.self_attn, layer.mlp
    found = {"q": attention.q_proj, "o": attention.o_proj}
    if not attention.layer.shares_kv:
        found["k"] = attention.k_proj
        if not attention.layer.k_eq_v:
            found["v"] = attention.v_proj
    found |= {"gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj}
    if hasattr(layer, "per_layer_input_gate"):
        found["own_gate"] = layer.per_layer_input_gate
        found["own_up"] = layer.per_layer_projection
    return found


class FusedLayer:
    """Computes `layer` in float32; it must not be changed afterwards."""

    def __init__(self, library: Library, layer: DecoderLayer) -> None:
        self._library = library
        self._module = layer
        attention = layer.self_attn
        self.layer = attention.layer
        linears = _linears(layer)
        self.width = attention.q_proj.out_features
        self.kept = self.layer.kv_heads * self.layer.head_dim
        own = linears.get("own_gate")
        norms: dict[str, RMSNorm] = {
            "before_attention": layer.input_layernorm,
            "after_attention": layer.post_attention_layernorm,
            "before_mlp": layer.pre_feedforward_layernorm,
            "after_mlp": layer.post_feedforward_layernorm,
            "q_norm": attention.q_norm,
        }
        if own is not None:
            norms["after_own"] = layer.post_per_layer_input_norm
        if not self.layer.shares_kv:
            norms["k_norm"] = attention.k_norm
        self._mixture = Mixture(layer) if layer.mixed else None
        self.struct = Layer(
            hidden=attention.q_proj.in_features,
            heads=self.width // self.layer.head_dim,
            kv_heads=self.layer.kv_heads,
            head_dim=self.layer.head_dim,
            intermediate=layer.mlp.gate_proj.out_features,
            own=0 if own is None else own.out_features,
            shares_kv=self.layer.shares_kv,
            values_are_keys=self.layer.k_eq_v,
            eps=layer.input_layernorm.eps,
            scalar=float(layer.layer_scalar),
            experts=None if self._mixture is None else ctypes.pointer(self._mixture.struct),
            **{name: linear(module.weight) for name, module in linears.items()},
            **{name: address(norm.weight) for name, norm in norms.items()},
        )

    def __call__(self, x: Tensor, own: Tensor | None, rotation: Rotation, kv: KeyValues) -> Tensor:
        if x.dtype is not torch.float32:
            made: Tensor = self._module(x, own, rotation, kv)
            return made
        return _compute(self._library, [self], x, own, [rotation], kv)


class FusedLayers:
    """Computes consecutive layers of a model in one call; each of them is fused."""

    def __init__(self, library: Library, layers: Sequence[FusedLayer]) -> None:
        self._library = library
        self._layers = layers

    def __call__(
        self,
        first: int,
        x: Tensor,
        own: Tensor | None,
        rotations: Sequence[Rotation],
        kv: KeyValues,
    ) -> Tensor:
        layers = self._layers[first : first + len(rotations)]
        part = None if own is None else own[:, first]
        return _compute(self._library, layers, x, part, rotations, kv)


def _compute(
    library: Library,
    layers: Sequence[FusedLayer],
    x: Tensor,
    own: Tensor | None,
    rotations: Sequence[Rotation],
    kv: KeyValues,
) -> Tensor:
    """What `layers` make of `x [n, hidden]`; behind `own [n, ple_dim]` lie those of the next."""
    n, count = len(x), len(layers)
    assert own is None or own.stride(1) == 1
    x = x.clone(memory_format=torch.contiguous_format)
    width, kept = max(layer.width for layer in layers), max(layer.kept for layer in layers)
    queries, attended = torch.empty(2, n, width)
    keys, values = torch.empty(2, n, kept)
    step = Step(
        x=address(x),
        inputs=None if own is None else own.data_ptr(),
        queries=address(queries),
        keys=address(keys),
        values=address(values),
        attended=address(attended),
        inputs_ld=0 if own is None else own.stride(0),
        n=n,
        threads=threads(),
    )
    library.layers(
        (ctypes.POINTER(Layer) * count)(*(ctypes.pointer(layer.struct) for layer in layers)),
        (Cache * count)(*(_cache(kv.paged(layer.layer.kv_source)) for layer in layers)),
        (Turn * count)(*(Turn(address(cos), address(sin)) for cos, sin in rotations)),
        step,
        count,
    )
    return x


def _cache(at: Paged) -> Cache:
    return Cache(
        keys=address(at.keys.data),
        values=address(at.values.data),
        key_scales=address(at.keys.scales),
        value_scales=address(at.values.scales),
        slots=address(at.slots),
        pages=address(at.pages),
        page_at=address(at.page_at),
        low=address(at.low),
        high=address(at.high),
        kind=_KEPT[at.keys.data.dtype],
    )
