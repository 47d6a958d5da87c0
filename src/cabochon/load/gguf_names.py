"""Where the tensors of a GGUF model belong: llama.cpp's names, and upstream's.

One row a name; `#` stands for a layer. Some tensors hold several that the model keeps apart, which
are cut by rows, and some were changed by the converter (conversion/gemma.py), which is undone by a
named transform. Nothing here matches a part of a component.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from cabochon.checkpoint.headers import TensorMeta
from cabochon.config import Gemma4Config
from cabochon.load.names import Named
from cabochon.load.transforms import Transform, shape_after
from cabochon.load.tree import (
    AUDIO,
    AUDIO_PROJECTOR,
    CLIP_BOUNDS,
    EMBEDDER,
    HEAD,
    TEXT,
    VISION,
    VISION_PROJECTOR,
)

_LAYER, _SEEN, _HEARD = f"{TEXT}.layers.#", f"{VISION}.encoder.layers.#", f"{AUDIO}.layers.#"
_SUBSAMPLE = f"{AUDIO}.subsample_conv_projection"

# Modules; what follows, the leaf, is the same in both.
_MODULES: Mapping[str, str] = {
    "token_embd": f"{TEXT}.embed_tokens",
    "per_layer_token_embd": f"{TEXT}.embed_tokens_per_layer",
    "per_layer_model_proj": f"{TEXT}.per_layer_model_projection",
    "per_layer_proj_norm": f"{TEXT}.per_layer_projection_norm",
    "output_norm": f"{TEXT}.norm",
    "output": HEAD,
    "nextn.pre_projection": "pre_projection",
    "nextn.post_projection": "post_projection",
    "blk.#.attn_norm": f"{_LAYER}.input_layernorm",
    "blk.#.attn_q": f"{_LAYER}.self_attn.q_proj",
    "blk.#.attn_k": f"{_LAYER}.self_attn.k_proj",
    "blk.#.attn_v": f"{_LAYER}.self_attn.v_proj",
    "blk.#.attn_output": f"{_LAYER}.self_attn.o_proj",
    "blk.#.attn_q_norm": f"{_LAYER}.self_attn.q_norm",
    "blk.#.attn_k_norm": f"{_LAYER}.self_attn.k_norm",
    "blk.#.post_attention_norm": f"{_LAYER}.post_attention_layernorm",
    "blk.#.ffn_norm": f"{_LAYER}.pre_feedforward_layernorm",
    "blk.#.ffn_gate": f"{_LAYER}.mlp.gate_proj",
    "blk.#.ffn_up": f"{_LAYER}.mlp.up_proj",
    "blk.#.ffn_down": f"{_LAYER}.mlp.down_proj",
    "blk.#.post_ffw_norm": f"{_LAYER}.post_feedforward_layernorm",
    "blk.#.post_ffw_norm_1": f"{_LAYER}.post_feedforward_layernorm_1",
    "blk.#.pre_ffw_norm_2": f"{_LAYER}.pre_feedforward_layernorm_2",
    "blk.#.post_ffw_norm_2": f"{_LAYER}.post_feedforward_layernorm_2",
    "blk.#.ffn_gate_inp": f"{_LAYER}.router.proj",
    "blk.#.ffn_gate_up_exps": f"{_LAYER}.experts.gate_up_proj",
    "blk.#.ffn_down_exps": f"{_LAYER}.experts.down_proj",
    "blk.#.inp_gate": f"{_LAYER}.per_layer_input_gate",
    "blk.#.proj": f"{_LAYER}.per_layer_projection",
    "blk.#.post_norm": f"{_LAYER}.post_per_layer_input_norm",
    "mm.input_projection": VISION_PROJECTOR,
    "mm.a.input_projection": AUDIO_PROJECTOR,
    "v.blk.#.ln1": f"{_SEEN}.input_layernorm",
    "v.blk.#.ln2": f"{_SEEN}.pre_feedforward_layernorm",
    "v.blk.#.attn_post_norm": f"{_SEEN}.post_attention_layernorm",
    "v.blk.#.ffn_post_norm": f"{_SEEN}.post_feedforward_layernorm",
    "v.blk.#.attn_q_norm": f"{_SEEN}.self_attn.q_norm",
    "v.blk.#.attn_k_norm": f"{_SEEN}.self_attn.k_norm",
    "v.patch_norm.2": f"{EMBEDDER}.patch_ln2",
    "v.patch_norm.3": f"{EMBEDDER}.pos_norm",
    "a.conv1d.0": f"{_SUBSAMPLE}.layer0.conv",
    "a.conv1d.0.norm": f"{_SUBSAMPLE}.layer0.norm",
    "a.conv1d.1": f"{_SUBSAMPLE}.layer1.conv",
    "a.conv1d.1.norm": f"{_SUBSAMPLE}.layer1.norm",
    "a.input_projection": f"{_SUBSAMPLE}.input_proj_linear",
    "a.pre_encode.out": f"{AUDIO}.output_proj",
    "a.blk.#.ffn_norm": f"{_HEARD}.feed_forward1.pre_layer_norm",
    "a.blk.#.ffn_post_norm": f"{_HEARD}.feed_forward1.post_layer_norm",
    "a.blk.#.ffn_norm_1": f"{_HEARD}.feed_forward2.pre_layer_norm",
    "a.blk.#.ffn_post_norm_1": f"{_HEARD}.feed_forward2.post_layer_norm",
    "a.blk.#.attn_pre_norm": f"{_HEARD}.norm_pre_attn",
    "a.blk.#.attn_post_norm": f"{_HEARD}.norm_post_attn",
    "a.blk.#.attn_k_rel": f"{_HEARD}.self_attn.relative_k_proj",
    # These two are each other's names: the converter's table has them so, and llama.cpp reads so.
    "a.blk.#.conv_norm": f"{_HEARD}.lconv1d.pre_layer_norm",
    "a.blk.#.norm_conv": f"{_HEARD}.lconv1d.conv_norm",
    "a.blk.#.ln2": f"{_HEARD}.norm_out",
}

# Matrices of towers, whose clip bounds are beside them: `x.weight` is `y.linear.weight`.
_CLIPPABLE: Mapping[str, str] = {
    **{f"v.blk.#.attn_{p}": f"{_SEEN}.self_attn.{p}_proj" for p in "qkv"},
    "v.blk.#.attn_out": f"{_SEEN}.self_attn.o_proj",
    **{f"v.blk.#.ffn_{p}": f"{_SEEN}.mlp.{p}_proj" for p in ("gate", "up", "down")},
    **{f"a.blk.#.attn_{p}": f"{_HEARD}.self_attn.{p}_proj" for p in "qkv"},
    "a.blk.#.attn_out": f"{_HEARD}.self_attn.post",
    "a.blk.#.ffn_up": f"{_HEARD}.feed_forward1.ffw_layer_1",
    "a.blk.#.ffn_down": f"{_HEARD}.feed_forward1.ffw_layer_2",
    "a.blk.#.ffn_up_1": f"{_HEARD}.feed_forward2.ffw_layer_1",
    "a.blk.#.ffn_down_1": f"{_HEARD}.feed_forward2.ffw_layer_2",
    "a.blk.#.conv_pw1": f"{_HEARD}.lconv1d.linear_start",
    "a.blk.#.conv_pw2": f"{_HEARD}.lconv1d.linear_end",
}

# Tensors whose whole name differs, or that the converter changed.
_TENSORS: Mapping[str, tuple[str, Transform | None]] = {
    "blk.#.layer_output_scale.weight": (f"{_LAYER}.layer_scalar", None),
    "blk.#.ffn_gate_inp.scale": (f"{_LAYER}.router.scale", None),
    # Of NVFP4 experts this is the product with their own scales: the same factor of the same sum.
    "blk.#.ffn_down_exps.scale": (f"{_LAYER}.router.per_expert_scale", None),
    "v.std_bias": (f"{VISION}.std_bias", None),
    "v.std_scale": (f"{VISION}.std_scale", None),
    "a.blk.#.per_dim_scale.weight": (f"{_HEARD}.self_attn.per_dim_scale", "before softplus"),
    "a.blk.#.conv_dw.weight": (f"{_HEARD}.lconv1d.depthwise_conv1d.weight", "depthwise"),
}

_TOWER: Mapping[str, tuple[str, Transform | None]] = {
    "v.patch_embd.weight": (f"{VISION}.patch_embedder.input_proj.weight", "channels last"),
    "v.position_embd.weight": (f"{VISION}.patch_embedder.position_embedding_table", None),
}
_NO_TOWER: Mapping[str, tuple[str, Transform | None]] = {
    "v.patch_embd.weight": (f"{EMBEDDER}.patch_dense.weight", "channels last"),
    "v.patch_embd.bias": (f"{EMBEDDER}.patch_dense.bias", None),
    "v.position_embd.weight": (f"{EMBEDDER}.pos_embedding", "axes swapped"),
    "v.patch_norm.1.weight": (f"{EMBEDDER}.patch_ln1.weight", "channels last"),
    "v.patch_norm.1.bias": (f"{EMBEDDER}.patch_ln1.bias", "channels last"),
}


_IN_LAYER = re.compile(r"\.layers\.(\d+)")


class GgufNames:
    """The names of one model's tensors."""

    def __init__(self, config: Gemma4Config) -> None:
        self._config = config
        unified = config.architecture.startswith("Gemma4Unified")
        self._tensors = {**_TENSORS, **(_NO_TOWER if unified else _TOWER)}
        self._stored = {name: stored for stored, name in _MODULES.items()}
        for stored, name in _CLIPPABLE.items():
            self._stored |= {name: stored, f"{name}.linear": stored}
        for stored, (name, _) in self._tensors.items():
            self._stored |= {name: stored, name.removesuffix(".weight"): stored}

    def stored(self, name: str) -> str:
        """What the file would call the model's `name`, a module or a tensor, if that is known."""
        number = _IN_LAYER.search(name)
        layer = number[1] if number else ""
        template = _IN_LAYER.sub(".layers.#", name, count=1)
        module, _, leaf = template.rpartition(".")
        if template in self._stored:
            return _in_layer(self._stored[template], layer)
        if module in self._stored:
            return _in_layer(f"{self._stored[module]}.{leaf}", layer)
        return name

    def read(self, meta: TensorMeta) -> Iterator[Named]:
        """What the stored tensor `meta` holds; a name that is not known stays as it is."""
        template, layer = _numbered(meta.name)
        if template in self._tensors:
            name, how = self._tensors[template]
            shape = meta.shape if how is None else shape_after(how, meta.shape)
            yield Named(_in_layer(name, layer), replace(meta, shape=shape), how)
            return
        module, _, leaf = template.rpartition(".")
        if module in _CLIPPABLE:
            yield _clippable(_in_layer(_CLIPPABLE[module], layer), leaf, meta)
        elif module in _MODULES:
            yield Named(f"{_in_layer(_MODULES[module], layer)}.{leaf}", meta)
        elif module == "blk.#.attn_qkv":
            yield from self._attention(meta, int(layer), leaf)
        elif module in ("blk.#.ffn_gate_exps", "blk.#.ffn_up_exps"):
            yield from self._experts(meta, layer, module, leaf)
        else:
            yield Named(meta.name, meta)

    def _attention(self, meta: TensorMeta, layer: int, leaf: str) -> Iterator[Named]:
        """Queries, keys and values, one below the other; one factor of all of them is shared."""
        text, name = self._config.text, f"{TEXT}.layers.{layer}.self_attn"
        if layer >= len(text.layers):
            yield Named(meta.name, meta)
            return
        dim, heads = text.layers[layer].head_dim, text.layers[layer].kv_heads
        rows = (text.num_heads * dim, heads * dim, heads * dim)
        projections = ("q_proj", "k_proj", "v_proj")
        if leaf == "weight" and len(meta.shape) == 2 and meta.shape[0] == sum(rows):
            for projection, part in zip(projections, cut(meta, rows), strict=True):
                yield Named(f"{name}.{projection}.{leaf}", part)
        elif leaf != "weight" and meta.shape == (1,):
            yield from (Named(f"{name}.{projection}.{leaf}", meta) for projection in projections)
        else:
            yield Named(meta.name, meta)

    def _experts(self, meta: TensorMeta, layer: str, module: str, leaf: str) -> Iterator[Named]:
        """Gates, or what they gate, of all experts, which the model keeps in turns."""
        experts = self._config.text.experts
        projection = "gate_proj" if module.endswith("gate_exps") else "up_proj"
        if experts is None or not meta.shape or meta.shape[0] != experts.count:
            yield Named(meta.name, meta)
            return
        for expert, part in enumerate(cut(meta, (1,) * experts.count)):
            shape = part.shape[1:] or (1,)
            name = f"{TEXT}.layers.{layer}.experts.{expert}.{projection}.{leaf}"
            yield Named(name, replace(part, shape=shape))


def cut(meta: TensorMeta, rows: Sequence[int]) -> Iterator[TensorMeta]:
    """`meta` in pieces of so many entries of its first axis."""
    assert sum(rows) == meta.shape[0]
    start, each = meta.span[0], meta.nbytes // meta.shape[0]
    for count in rows:
        span = (start, start + count * each)
        yield replace(meta, shape=(count, *meta.shape[1:]), span=span)
        start = span[1]


def _numbered(name: str) -> tuple[str, str]:
    """`blk.7.attn_q.weight` as a template and the layer in it."""
    prefix, found, rest = name.partition("blk.")
    number, dot, leaf = rest.partition(".")
    canonical = number.isdecimal() and str(int(number)) == number
    if found and dot and canonical and prefix in ("", "v.", "a."):
        return f"{prefix}blk.#.{leaf}", number
    return name, ""


def _in_layer(name: str, layer: str) -> str:
    return name.replace("#", layer)


def _clippable(module: str, leaf: str, meta: TensorMeta) -> Named:
    if leaf in CLIP_BOUNDS:
        shape = shape_after("scalar", meta.shape)
        return Named(f"{module}.{leaf}", replace(meta, shape=shape), "scalar")
    return Named(f"{module}.linear.{leaf}", meta)
