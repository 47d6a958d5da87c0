"""Drafters: what their configuration has beside layers, and which target they fit."""

from __future__ import annotations

from dataclasses import replace

from cabochon.config.section import Section
from cabochon.config.types import Clusters, Drafting, Gemma4Config
from cabochon.errors import MismatchError

UNKNOWN = -1  # the source of keys and values of a drafter that has no target yet


def drafting_of(section: Section, text: Section) -> Drafting:
    """What a drafter's `config.json`, and the text part of it, say of drafting.

    Raises:
        ConfigError: a value that upstream's drafters do not have either.
    """
    text.only("enable_moe_block", False)
    text.only("use_double_wide_mlp", False)
    text.only("hidden_size_per_layer_input", 0)
    text.only("num_kv_shared_layers", 0, text.count("num_hidden_layers", 30))
    clusters = None
    if section.flag("use_ordered_embeddings", False):
        count = section.size("num_centroids", 2048)
        chosen = section.size("centroid_intermediate_top_k", 32)
        vocabulary = text.size("vocab_size", 262_144)
        if vocabulary % count:
            detail = f"but {vocabulary} tokens are no multiple of it"
            raise section.wrong("num_centroids", count, detail)
        if chosen > count:
            detail = f"but num_centroids is {count}"
            raise section.wrong("centroid_intermediate_top_k", chosen, detail)
        clusters = Clusters(count=count, chosen=chosen)
    return Drafting(target_size=section.size("backbone_hidden_size", 1536), clusters=clusters)


def beside(drafter: Gemma4Config, target: Gemma4Config) -> Gemma4Config:
    """`drafter` with its layers reading what `target` keeps of its last layers of each kind.

    Raises:
        MismatchError: it was made for another model.
    """
    assert drafter.drafting is not None
    sources = {layer.kind: layer for layer in target.text.layers if not layer.shares_kv}
    _expect("backbone_hidden_size", drafter.drafting.target_size, target.text.hidden_size)
    _expect("vocab_size", drafter.text.vocab_size, target.text.vocab_size)
    for layer in drafter.text.layers:
        source, of = sources[layer.kind], f"of {layer.kind} layers"
        _expect(f"the size of heads {of}", layer.head_dim, source.head_dim)
        _expect(f"the number of key and value heads {of}", layer.kv_heads, source.kv_heads)
        _expect(f"the window {of}", layer.window, source.window)
        rotation, needed = (config.text.rope[layer.kind] for config in (drafter, target))
        _expect(f"the rotary base {of}", rotation.theta, needed.theta)
        _expect(f"the rotating share {of}", rotation.fraction, needed.fraction)
    layers = (replace(layer, kv_source=sources[layer.kind].index) for layer in drafter.text.layers)
    return replace(drafter, text=replace(drafter.text, layers=tuple(layers)))


def _expect(what: str, found: object, needed: object) -> None:
    if found != needed:
        raise MismatchError(
            f"this drafter is not of this model: {what} is {found}, and {needed} of the model."
            " Name the drafter that was published with it"
        )
