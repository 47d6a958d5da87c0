"""Decoder layers in one call: what `gemma4.text.DecoderLayer` computes, without Python between."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor

from cabochon.gemma4.drafter import Drafter
from cabochon.gemma4.model import Gemma4
from cabochon.gemma4.text import DecoderLayer, TextModel
from cabochon.kernels import mixtures
from cabochon.kernels.floats import FloatsWeight
from cabochon.kernels.library import (
    Access,
    Cache,
    Layer,
    Library,
    Own,
    Step,
    Turn,
    address,
    threads,
)
from cabochon.kernels.mixtures import Mixture, linear
from cabochon.kernels.packed import PackedWeight
from cabochon.nn.attention import KeyValues
from cabochon.nn.kept import Store
from cabochon.nn.linear import Linear as Module
from cabochon.nn.norm import RMSNorm
from cabochon.nn.rotary import Rotation, text_frequencies

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
            text.together = FusedText(library, list(fused.values()), text)
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
        alone = FusedLayers(self._library, [self], [0])
        return alone(range(1), x, None if own is None else own[:, None], [rotation], kv)


class FusedLayers:
    """Computes consecutive layers in one call, and `final` behind the last of them.

    Layer i turns by rotation `turns[i]`.
    """

    def __init__(
        self,
        library: Library,
        layers: Sequence[FusedLayer],
        turns: Sequence[int],
        final: RMSNorm | None = None,
    ) -> None:
        self._library = library
        self._alive = layers
        self._final = final
        self._width = max(layer.width for layer in layers)
        self._kept = max(layer.kept for layer in layers)
        count = len(layers)
        pointers = [ctypes.pointer(layer.struct) for layer in layers]
        self._layers = (ctypes.POINTER(Layer) * count)(*pointers)
        self._turns = (ctypes.c_int32 * count)(*turns)
        # Threads may compute with caches of their own: a pair is replaced, never changed.
        self._caches: tuple[ref[Store], ctypes.Array[Cache]] | None = None

    def __call__(
        self,
        layers: range,
        x: Tensor,
        own: Tensor | None,
        rotations: Sequence[Rotation],
        kv: KeyValues,
    ) -> Tensor:
        """What `layers` make of `x [n, hidden]`; `own [n, layers, ple_dim]` is of all."""
        n = len(x)
        assert own is None or own[0].is_contiguous()
        x = x.clone(memory_format=torch.contiguous_format)
        norm = self._final if layers.stop == len(self._alive) else None
        queries, attended = torch.empty(2, n, self._width)
        keys, values = torch.empty(2, n, self._kept)
        accesses = kv.accesses()  # lives until all is computed
        seen = [Access(*map(address, access)) for access in accesses]
        turns = [Turn(address(cos), address(sin)) for cos, sin in rotations]
        step = Step(
            rotations=(Turn * len(turns))(*turns),
            accesses=(Access * len(seen))(*seen),
            x=address(x),
            inputs=None if own is None else own[:, layers.start].data_ptr(),
            queries=address(queries),
            keys=address(keys),
            values=address(values),
            attended=address(attended),
            norm=None if norm is None else address(norm.weight),
            inputs_ld=0 if own is None else own.stride(0),
            n=n,
            threads=threads(),
            eps=0.0 if norm is None else norm.eps,
        )
        caches, run = self._caches_in(kv.store), (layers.start, len(layers))
        self._library.layers(self._layers, caches, self._turns, step, *run)
        return x

    def _caches_in(self, store: Store) -> ctypes.Array[Cache]:
        known = self._caches
        if known is not None and known[0]() is store:
            return known[1]
        made = [_cache(store, layer.layer.kv_source) for layer in self._alive]
        caches = (Cache * len(made))(*made)
        self._caches = (ref(store), caches)
        return caches


def _cache(store: Store, source: int) -> Cache:
    keys, values = store.keys[source], store.values[source]
    return Cache(
        keys=address(keys.data),
        values=address(values.data),
        key_scales=address(keys.scales),
        value_scales=address(values.scales),
        kind=_KEPT[keys.data.dtype],
        group=store.group_of[source],
    )


class FusedText(FusedLayers):
    """Computes all layers of `text`, and what they are given of a token and its place."""

    def __init__(self, library: Library, layers: Sequence[FusedLayer], text: TextModel) -> None:
        super().__init__(library, layers, text.turns, text.norm)
        rope, cpu = text.config.rope, torch.device("cpu")
        self._frequencies = [text_frequencies(dim, rope[kind], cpu) for kind, dim in text.kinds]
        self._own: Own | None = None
        if text.config.ple_dim:
            norm = text.per_layer_projection_norm
            self._own = Own(
                norm=address(norm.weight),
                layers=len(layers),
                dim=text.config.ple_dim,
                eps=norm.eps,
                scale=text.config.hidden_size**-0.5,
            )

    def inputs(self, context: Tensor, found: Tensor) -> Tensor:
        assert self._own is not None
        found = found.contiguous()
        self._library.own(self._own, address(found), address(context), len(context), threads())
        return context

    def rotations(self, positions: Tensor) -> list[Rotation]:
        positions, made = positions.contiguous(), []
        for frequencies in self._frequencies:
            shape = (len(positions), 1, len(frequencies))
            rotation = Rotation(torch.empty(shape), torch.empty(shape))
            self._library.turn(
                address(frequencies),
                address(positions),
                *shape[::2],
                *map(address, rotation),
                threads(),
            )
            made.append(rotation)
        return made
