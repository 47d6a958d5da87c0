"""Decoder layers, one or all, in one call: what `gemma4.text` computes, without Python between."""

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
from cabochon.kernels.library import (
    Access,
    Cache,
    Layer,
    Library,
    Linear,
    Pass,
    Step,
    Text,
    Turn,
    address,
    threads,
)
from cabochon.kernels.mixtures import Mixture
from cabochon.kernels.multiplied import Multiplied, linear
from cabochon.nn.attention import Access as Seen
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
        if len(fused) == len(text.layers) and _projects(text):
            text.together = FusedText(library, list(fused.values()), text)
    text.fused |= fused
    how = "all layers in one call" if text.together else "a layer in one call"
    return f"{len(fused)} of {len(text.layers)} layers are fused, {how}"


def _projects(text: TextModel) -> bool:
    """Whether there is a kernel for what layers get of a token, if they get anything."""
    if not text.config.ple_dim:
        return True
    return isinstance(text.per_layer_model_projection.weight, Multiplied)


def _fits(layer: DecoderLayer) -> bool:
    """Whether all matrices have kernels, and all sizes fill vectors."""
    attention, mlp = layer.self_attn, layer.mlp
    sizes = [attention.q_proj.in_features, mlp.gate_proj.out_features]
    sizes += [attention.layer.head_dim, *mixtures.sizes(layer)]
    if hasattr(layer, "per_layer_input_gate"):
        sizes.append(layer.per_layer_input_gate.out_features)
    weights = [module.weight for module in _linears(layer).values()]
    known = all(isinstance(weight, Multiplied) for weight in weights)
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
            heads=attention.q_proj.out_features // self.layer.head_dim,
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
        x = x.clone(memory_format=torch.contiguous_format)
        assert own is None or own.stride(1) == 1
        cache, accesses = _cache(kv.store, self.layer.kv_source), kv.accesses()
        self._library.layer(
            self.struct,
            cache,
            _access(accesses[cache.group]),
            Turn(*map(address, rotation)),
            Pass(
                x=address(x),
                inputs=None if own is None else own.data_ptr(),
                inputs_ld=0 if own is None else own.stride(0),
                n=len(x),
                threads=threads(),
            ),
        )
        return x


class FusedText:
    """Computes all layers of `text`, what they are given of a token and its place, and the norm."""

    def __init__(self, library: Library, layers: Sequence[FusedLayer], text: TextModel) -> None:
        self._library = library
        self._layers = layers
        config, count, kinds = text.config, len(layers), len(text.kinds)
        rope, cpu = config.rope, torch.device("cpu")
        frequencies = [text_frequencies(dim, rope[kind], cpu) for kind, dim in text.kinds]
        norms = {"norm": text.norm.weight}
        projection = Linear()
        if config.ple_dim:
            norms["own_norm"] = text.per_layer_projection_norm.weight
            projection = linear(text.per_layer_model_projection.weight)
        pointers = [ctypes.pointer(layer.struct) for layer in layers]
        turns = (ctypes.c_int32 * count)(*text.turns)
        tables = (ctypes.c_void_p * kinds)(*map(address, frequencies))
        pairs = (ctypes.c_int32 * kinds)(*map(len, frequencies))
        self._alive = (frequencies, norms, turns, tables, pairs)
        self._struct = Text(
            layers=(ctypes.POINTER(Layer) * count)(*pointers),
            turns=ctypes.addressof(turns),
            frequencies=ctypes.addressof(tables),
            pairs=ctypes.addressof(pairs),
            projection=projection,
            count=count,
            writing=sum(not layer.layer.shares_kv for layer in layers),
            rotations=kinds,
            own=config.ple_dim or 0,
            own_scale=config.hidden_size**-0.5,
            eps=config.eps,
            **{name: address(weight) for name, weight in norms.items()},
        )
        # Threads may compute with caches of their own: a pair is replaced, never changed.
        self._caches: tuple[ref[Store], ctypes.Array[Cache]] | None = None

    def __call__(
        self,
        x: Tensor,
        found: Tensor | None,
        positions: Tensor,
        kv: KeyValues,
        wanted: Tensor | None,
    ) -> Tensor:
        assert positions.dtype is torch.int64
        rows = len(x) if wanted is None else len(wanted)
        y = x.new_empty(rows, x.shape[1])
        accesses = kv.accesses()  # lives until all is computed
        step = Step(
            accesses=(Access * len(accesses))(*map(_access, accesses)),
            x=address(x),
            found=address(found),
            positions=address(positions),
            wanted=address(wanted),
            y=address(y),
            groups=len(accesses),
            n=len(x),
            rows=rows,
            threads=threads(),
        )
        self._library.text(self._struct, self._caches_in(kv.store), step)
        return y

    def _caches_in(self, store: Store) -> ctypes.Array[Cache]:
        known = self._caches
        if known is not None and known[0]() is store:
            return known[1]
        made = [_cache(store, layer.layer.kv_source) for layer in self._layers]
        caches = (Cache * len(made))(*made)
        self._caches = (ref(store), caches)
        return caches


def _access(access: Seen) -> Access:
    return Access(*(part.buffer_info()[0] for part in access))


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
