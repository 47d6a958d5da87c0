"""Decoder layers in one call: what `gemma4.text.DecoderLayer` computes, without Python between."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cabochon.gemma4.model import Gemma4
from cabochon.gemma4.text import DecoderLayer
from cabochon.kernels import mixtures
from cabochon.kernels.floats import FEW, FloatsWeight
from cabochon.kernels.library import Cache, Layer, Library, Step, address, threads
from cabochon.kernels.mixtures import Mixture, linear
from cabochon.kernels.packed import PackedWeight
from cabochon.nn.attention import KeyValues, Paged
from cabochon.nn.linear import Linear as Module
from cabochon.nn.norm import RMSNorm
from cabochon.nn.rotary import Rotation

WIDTH = 16  # floats of the widest vectors; sizes must be multiples

_KEPT = {torch.float32: 0, torch.float16: 1, torch.int8: 2}


def fuse(model: Gemma4, library: Library | None) -> str:
    """Let every layer that can be run in one call; returns what was fused, for people."""
    text = model.model.language_model
    if library is not None:
        for index, layer in enumerate(text.layers):
            assert isinstance(layer, DecoderLayer)
            if _fits(layer):
                text.fused[index] = FusedLayer(library, layer)
    return f"{len(text.fused)} of {len(text.layers)} layers in one call each"


def _fits(layer: DecoderLayer) -> bool:
    """Whether all matrices have kernels that round activations, and all sizes fill vectors."""
    attention, mlp = layer.self_attn, layer.mlp
    sizes = [attention.q_proj.in_features, mlp.gate_proj.out_features]
    sizes += [attention.layer.head_dim, *mixtures.sizes(layer)]
    if hasattr(layer, "per_layer_input_gate"):
        sizes.append(layer.per_layer_input_gate.out_features)
    weights = [module.weight for module in _linears(layer).values()]
    known = all(isinstance(weight, PackedWeight | FloatsWeight) for weight in weights)
    fast = any(isinstance(w, PackedWeight) and w.activations != "float32" for w in weights)
    whole = all(size % WIDTH == 0 for size in sizes)
    return known and fast and whole and mixtures.has_kernels(layer)


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
        self._layer = attention.layer
        linears = _linears(layer)
        self._few = any(isinstance(module.weight, FloatsWeight) for module in linears.values())
        self._width = attention.q_proj.out_features
        self._kept = self._layer.kv_heads * self._layer.head_dim
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
        if not self._layer.shares_kv:
            norms["k_norm"] = attention.k_norm
        self._mixture = Mixture(layer) if layer.mixed else None
        self._struct = Layer(
            hidden=attention.q_proj.in_features,
            heads=self._width // self._layer.head_dim,
            kv_heads=self._layer.kv_heads,
            head_dim=self._layer.head_dim,
            intermediate=layer.mlp.gate_proj.out_features,
            own=0 if own is None else own.out_features,
            shares_kv=self._layer.shares_kv,
            values_are_keys=self._layer.k_eq_v,
            eps=layer.input_layernorm.eps,
            scalar=float(layer.layer_scalar),
            experts=None if self._mixture is None else ctypes.pointer(self._mixture.struct),
            **{name: linear(module.weight) for name, module in linears.items()},
            **{name: address(norm.weight) for name, norm in norms.items()},
        )

    def __call__(self, x: Tensor, own: Tensor | None, rotation: Rotation, kv: KeyValues) -> Tensor:
        n = len(x)
        if x.dtype is not torch.float32 or (self._few and n > FEW):
            made: Tensor = self._module(x, own, rotation, kv)
            return made
        assert own is None or own.stride(1) == 1
        x = x.clone(memory_format=torch.contiguous_format)
        room = torch.empty(n * 2 * (self._width + self._kept))
        queries, attended, keys, values = room.split(
            [n * size for size in (self._width, self._width, self._kept, self._kept)]
        )
        step = Step(
            x=address(x),
            cos=address(rotation.cos),
            sin=address(rotation.sin),
            inputs=None if own is None else own.data_ptr(),
            queries=address(queries),
            keys=address(keys),
            values=address(values),
            attended=address(attended),
            inputs_ld=0 if own is None else own.stride(0),
            n=n,
            threads=threads(),
        )
        self._library.layer(self._struct, _cache(kv.paged(self._layer.kv_source)), step)
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
