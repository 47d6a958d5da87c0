"""What a configuration needs: every matrix and every other parameter, by name and shape.

The same statement as the modules of `gemma4`, made without torch so that `inspect` starts at once;
a test holds the two equal, name by name. Canonical names are those of upstream's multimodal model,
for text-only checkpoints too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cabochon.config import (
    AudioConfig,
    Drafting,
    ExpertsConfig,
    Gemma4Config,
    LayerConfig,
    PatchConfig,
    TextConfig,
    VisionConfig,
)
from cabochon.quant.scheme import Site

TEXT = "model.language_model"
VISION = "model.vision_tower"
EMBEDDER = "model.vision_embedder"
AUDIO = "model.audio_tower"
VISION_PROJECTOR = "model.embed_vision.embedding_projection"
AUDIO_PROJECTOR = "model.embed_audio.embedding_projection"
HEAD = "lm_head"

CLIP_BOUNDS = ("input_min", "input_max", "output_min", "output_max")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor that is not a site: never quantized, of exactly this shape."""

    name: str
    shape: tuple[int, ...]
    bound: bool = False  # a clip bound, which may be infinite
    order: bool = False  # integers, each from 0 on once


@dataclass(frozen=True, slots=True)
class Tree:
    sites: tuple[Site, ...]
    parameters: tuple[Parameter, ...]


def needed(config: Gemma4Config, *, has_head: bool) -> Tree:
    """Everything that a `Gemma4` or a `Drafter` of `config` must be given."""
    entries, hidden = [*_text(config.text)], config.text.hidden_size
    if config.vision is not None:
        vision = config.vision
        entries += _vision(vision) if isinstance(vision, VisionConfig) else _patches(vision)
        entries.append(_linear(VISION_PROJECTOR, hidden, vision.hidden_size))
    if isinstance(config.audio, AudioConfig):
        entries += _audio(config.audio)
        entries.append(_linear(AUDIO_PROJECTOR, hidden, config.audio.output_size))
    elif config.audio is not None:
        entries.append(_linear(AUDIO_PROJECTOR, hidden, config.audio.samples))
    if config.drafting is not None:
        entries += _drafting(config.text, config.drafting)
    if has_head:
        entries.append(_linear(HEAD, config.text.vocab_size, config.text.hidden_size))
    return Tree(
        sites=tuple(entry for entry in entries if isinstance(entry, Site)),
        parameters=tuple(entry for entry in entries if isinstance(entry, Parameter)),
    )


def _linear(name: str, out_features: int, in_features: int) -> Site:
    return Site(name, "linear", out_features, in_features)


def _norm(name: str, dim: int) -> Parameter:
    return Parameter(f"{name}.weight", (dim,))


def _text(text: TextConfig) -> Iterator[Site | Parameter]:
    hidden, ple_width = text.hidden_size, len(text.layers) * text.ple_dim
    yield Site(f"{TEXT}.embed_tokens", "embedding", text.vocab_size, hidden)
    if text.ple_dim:
        name = f"{TEXT}.embed_tokens_per_layer"
        yield Site(name, "embedding", text.ple_vocab_size, ple_width)
        yield _linear(f"{TEXT}.per_layer_model_projection", ple_width, hidden)
        yield _norm(f"{TEXT}.per_layer_projection_norm", text.ple_dim)
    for layer in text.layers:
        yield from _layer(f"{TEXT}.layers.{layer.index}", text, layer)
    yield _norm(f"{TEXT}.norm", hidden)


def _layer(name: str, text: TextConfig, layer: LayerConfig) -> Iterator[Site | Parameter]:
    hidden = text.hidden_size
    yield Parameter(f"{name}.layer_scalar", (1,))
    yield _norm(f"{name}.input_layernorm", hidden)
    yield from _attention(f"{name}.self_attn", text, layer)
    yield _norm(f"{name}.post_attention_layernorm", hidden)
    yield _norm(f"{name}.pre_feedforward_layernorm", hidden)
    for projection in ("gate_proj", "up_proj"):
        yield _linear(f"{name}.mlp.{projection}", layer.intermediate_size, hidden)
    yield _linear(f"{name}.mlp.down_proj", hidden, layer.intermediate_size)
    yield _norm(f"{name}.post_feedforward_layernorm", hidden)
    if text.experts is not None:
        yield from _experts(name, hidden, text.experts)
    if text.ple_dim:
        yield _linear(f"{name}.per_layer_input_gate", text.ple_dim, hidden)
        yield _linear(f"{name}.per_layer_projection", hidden, text.ple_dim)
        yield _norm(f"{name}.post_per_layer_input_norm", hidden)


def _experts(name: str, hidden: int, experts: ExpertsConfig) -> Iterator[Site | Parameter]:
    count, width = experts.count, experts.intermediate_size
    yield _linear(f"{name}.router.proj", count, hidden)
    yield Parameter(f"{name}.router.scale", (hidden,))
    yield Parameter(f"{name}.router.per_expert_scale", (count,))
    gate_up, down = f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj"
    yield Site(gate_up, "experts", count * 2 * width, hidden, parts=2 * count)
    yield Site(down, "experts", count * hidden, width, parts=count)
    yield _norm(f"{name}.post_feedforward_layernorm_1", hidden)
    yield _norm(f"{name}.pre_feedforward_layernorm_2", hidden)
    yield _norm(f"{name}.post_feedforward_layernorm_2", hidden)


def _attention(name: str, text: TextConfig, layer: LayerConfig) -> Iterator[Site | Parameter]:
    queries, keys = text.num_heads * layer.head_dim, layer.kv_heads * layer.head_dim
    yield _linear(f"{name}.q_proj", queries, text.hidden_size)
    yield _norm(f"{name}.q_norm", layer.head_dim)
    if not layer.shares_kv:
        yield _linear(f"{name}.k_proj", keys, text.hidden_size)
        yield _norm(f"{name}.k_norm", layer.head_dim)
        if not layer.k_eq_v:
            yield _linear(f"{name}.v_proj", keys, text.hidden_size)
    yield _linear(f"{name}.o_proj", text.hidden_size, queries)


def _vision(vision: VisionConfig) -> Iterator[Site | Parameter]:
    hidden = vision.hidden_size
    table = (2, vision.position_table_size, hidden)
    yield Parameter(f"{VISION}.patch_embedder.position_embedding_table", table)
    yield _linear(f"{VISION}.patch_embedder.input_proj", hidden, 3 * vision.patch_size**2)
    for index in range(vision.num_layers):
        yield from _vision_layer(f"{VISION}.encoder.layers.{index}", vision)
    if vision.standardize:
        yield Parameter(f"{VISION}.std_bias", (hidden,))
        yield Parameter(f"{VISION}.std_scale", (hidden,))


def _vision_layer(name: str, vision: VisionConfig) -> Iterator[Site | Parameter]:
    hidden, width = vision.hidden_size, vision.num_heads * vision.head_dim
    yield _norm(f"{name}.input_layernorm", hidden)
    for projection in ("q_proj", "k_proj", "v_proj"):
        yield from _clippable(f"{name}.self_attn.{projection}", width, hidden, vision)
    yield from _clippable(f"{name}.self_attn.o_proj", hidden, width, vision)
    yield _norm(f"{name}.self_attn.q_norm", vision.head_dim)
    yield _norm(f"{name}.self_attn.k_norm", vision.head_dim)
    yield _norm(f"{name}.post_attention_layernorm", hidden)
    yield _norm(f"{name}.pre_feedforward_layernorm", hidden)
    for projection in ("gate_proj", "up_proj"):
        yield from _clippable(f"{name}.mlp.{projection}", vision.intermediate_size, hidden, vision)
    yield from _clippable(f"{name}.mlp.down_proj", hidden, vision.intermediate_size, vision)
    yield _norm(f"{name}.post_feedforward_layernorm", hidden)


def _patches(vision: PatchConfig) -> Iterator[Site | Parameter]:
    width = vision.hidden_size
    yield from _layer_norm(f"{EMBEDDER}.patch_ln1", vision.pixels)
    yield _linear(f"{EMBEDDER}.patch_dense", width, vision.pixels)
    yield Parameter(f"{EMBEDDER}.patch_dense.bias", (width,))
    yield from _layer_norm(f"{EMBEDDER}.patch_ln2", width)
    yield Parameter(f"{EMBEDDER}.pos_embedding", (vision.position_table_size, 2, width))
    yield from _layer_norm(f"{EMBEDDER}.pos_norm", width)


def _drafting(text: TextConfig, drafting: Drafting) -> Iterator[Site | Parameter]:
    hidden, target = text.hidden_size, drafting.target_size
    yield _linear("pre_projection", hidden, 2 * target)
    yield _linear("post_projection", target, hidden)
    if drafting.clusters is not None:
        yield _linear("masked_embedding.centroids", drafting.clusters.count, hidden)
        yield Parameter("masked_embedding.token_ordering", (text.vocab_size,), order=True)


def _layer_norm(name: str, dim: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (dim,))
    yield Parameter(f"{name}.bias", (dim,))


def _audio(audio: AudioConfig) -> Iterator[Site | Parameter]:
    hidden, (first, second) = audio.hidden_size, audio.conv_channels
    subsample = f"{AUDIO}.subsample_conv_projection"
    yield Parameter(f"{subsample}.layer0.conv.weight", (first, 1, 3, 3))
    yield _norm(f"{subsample}.layer0.norm", first)
    yield Parameter(f"{subsample}.layer1.conv.weight", (second, first, 3, 3))
    yield _norm(f"{subsample}.layer1.norm", second)
    yield _linear(f"{subsample}.input_proj_linear", hidden, first // 4 * second)
    for index in range(audio.num_layers):
        yield from _audio_layer(f"{AUDIO}.layers.{index}", audio)
    yield _linear(f"{AUDIO}.output_proj", audio.output_size, hidden)
    yield Parameter(f"{AUDIO}.output_proj.bias", (audio.output_size,))


def _audio_layer(name: str, audio: AudioConfig) -> Iterator[Site | Parameter]:
    hidden = audio.hidden_size
    yield from _feed_forward(f"{name}.feed_forward1", audio)
    yield _norm(f"{name}.norm_pre_attn", hidden)
    for projection in ("q_proj", "k_proj", "v_proj"):
        yield from _clippable(f"{name}.self_attn.{projection}", hidden, hidden, audio)
    yield _linear(f"{name}.self_attn.relative_k_proj", hidden, hidden)
    yield Parameter(f"{name}.self_attn.per_dim_scale", (hidden // audio.num_heads,))
    yield from _clippable(f"{name}.self_attn.post", hidden, hidden, audio)
    yield _norm(f"{name}.norm_post_attn", hidden)
    yield _norm(f"{name}.lconv1d.pre_layer_norm", hidden)
    yield from _clippable(f"{name}.lconv1d.linear_start", 2 * hidden, hidden, audio)
    yield Parameter(f"{name}.lconv1d.depthwise_conv1d.weight", (hidden, 1, audio.conv_kernel))
    yield _norm(f"{name}.lconv1d.conv_norm", hidden)
    yield from _clippable(f"{name}.lconv1d.linear_end", hidden, hidden, audio)
    yield from _feed_forward(f"{name}.feed_forward2", audio)
    yield _norm(f"{name}.norm_out", hidden)


def _feed_forward(name: str, audio: AudioConfig) -> Iterator[Site | Parameter]:
    hidden = audio.hidden_size
    yield _norm(f"{name}.pre_layer_norm", hidden)
    yield from _clippable(f"{name}.ffw_layer_1", 4 * hidden, hidden, audio)
    yield from _clippable(f"{name}.ffw_layer_2", hidden, 4 * hidden, audio)
    yield _norm(f"{name}.post_layer_norm", hidden)


def _clippable(
    name: str, out_features: int, in_features: int, tower: VisionConfig | AudioConfig
) -> Iterator[Site | Parameter]:
    if tower.clipped:
        for bound in CLIP_BOUNDS:
            yield Parameter(f"{name}.{bound}", (), bound=True)
    yield _linear(f"{name}.linear", out_features, in_features)
