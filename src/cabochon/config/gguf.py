"""Reads a configuration from the metadata of a GGUF model and of its projector.

The keys are those of llama.cpp's converter. What metadata does not say, shapes and the presence of
tensors do; what neither says is the same in every Gemma 4, and stands here as a number.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cabochon.config.architectures import ForeignArchitecture
from cabochon.config.section import Section
from cabochon.config.types import (
    AudioConfig,
    ExpertsConfig,
    FrameConfig,
    Gemma4Config,
    LayerConfig,
    LayerKind,
    PatchConfig,
    PictureSight,
    RopeConfig,
    SpecialTokens,
    TextConfig,
    VisionConfig,
)
from cabochon.errors import ConfigError

ARCHITECTURE = "gemma4"
TOKENS = "tokenizer.ggml.tokens"
STILL = 1e30  # by what the converter divides frequencies of pairs that do not rotate

Shapes = Mapping[str, tuple[int, ...]]

# By the projectors of pictures and sounds.
_NAMES = {
    (None, None): "Gemma4ForCausalLM",
    ("gemma4v", None): "Gemma4ForConditionalGeneration",
    ("gemma4v", "gemma4a"): "Gemma4ForConditionalGeneration",
    ("gemma4uv", "gemma4ua"): "Gemma4UnifiedForConditionalGeneration",
}

# Keys that change what is computed, with the values that are computed.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (1.0,),
    "rope.scale_linear": (1.0,),
    "attention.scale": (1.0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0.0,),
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "expert_weights_scale": (1.0,),
    "nextn_predict_layers": (0,),
}


@dataclass(frozen=True, slots=True)
class Described:
    """What a model in GGUF says of itself."""

    metadata: Mapping[str, Any]
    projector: Mapping[str, Any] | None  # the metadata of the projector beside it
    shapes: Shapes  # of all tensors, `[out, in]`
    # `rope_freqs.weight`: what divides each pair's frequency. None: it is not here to be read
    rope_factors: Sequence[float] | None
    file: str


def parse_gguf(described: Described) -> Gemma4Config:
    """The configuration that metadata and shapes describe.

    Raises:
        ConfigError: a missing or unusable value, a feature not supported.
        ForeignArchitecture: a model that this engine does not run.
    """
    metadata = described.metadata
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ConfigError(f"{described.file}: general.architecture is {name!r}, expected a name")
    if name != ARCHITECTURE:
        raise ForeignArchitecture(name)
    if metadata.get("general.type", "model") != "model":
        kind = metadata["general.type"]
        raise ConfigError(f"{described.file}: general.type is {kind!r}, expected a model")
    projector = dict(described.projector or {})
    kinds = tuple(_projector_kind(projector, part) for part in ("vision", "audio"))
    if kinds not in _NAMES:
        known = " or ".join(f"{v} and {a}" if a else str(v) for v, a in list(_NAMES)[1:])
        raise ConfigError(f"{described.file}: its projector is {kinds}, expected {known}")
    text = _section(metadata, ARCHITECTURE, described.file)
    for key, allowed in _ONLY.items():
        text.only(key, *allowed)
    see, hear = (_patches, _frames) if kinds[0] == "gemma4uv" else (_vision, _audio)
    config = _text(text, described, unified=kinds[0] == "gemma4uv")
    parts = [_section(projector, f"clip.{part}", described.file) for part in ("vision", "audio")]
    for part, kind in zip(parts, kinds, strict=True):
        if kind is not None:
            part.only("projection_dim", config.hidden_size)
    return Gemma4Config(
        architecture=_NAMES[kinds],
        text=config,
        vision=None if kinds[0] is None else see(parts[0], described.shapes),
        audio=None if kinds[1] is None else hear(parts[1], described.shapes),
        tokens=_special_tokens(described, media=kinds[0] is not None),
    )


def _projector_kind(projector: Mapping[str, Any], part: str) -> str | None:
    if not projector.get(f"clip.has_{part}_encoder", False):
        return None
    kind: str | None = projector.get(f"clip.{part}.projector_type")
    return kind


def _section(metadata: Mapping[str, Any], prefix: str, file: str) -> Section:
    """The keys under `prefix`; floats as the decimals that they were written from."""
    start = prefix + "."
    values = {
        key[len(start) :]: _decimal(value) if isinstance(value, float) else value
        for key, value in metadata.items()
        if key.startswith(start)
    }
    return Section(values, prefix, file)


def _decimal(value: float) -> float:
    """The shortest decimal that is the same 32-bit float: 1e-6, not 9.999999974752427e-07."""
    for digits in range(6, 10):
        short = float(f"{value:.{digits}g}")
        if abs(short) < 3.4e38 and struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _need(section: Section, key: str) -> int:
    """The size under `key`, which has no default."""
    if key not in section.values:
        raise section.wrong(key, None, "expected a size; the model cannot be told without it")
    return section.size(key, 1)


def _text(section: Section, described: Described, *, unified: bool) -> TextConfig:
    shapes, metadata = described.shapes, described.metadata
    tokens = metadata.get(TOKENS, ())
    vocab_size = shapes.get("token_embd.weight", (len(tokens),))[0]
    ple_dim = section.integer("embedding_length_per_layer_input", 0)
    pad = _section(metadata, "tokenizer.ggml", described.file).integer("padding_token_id", 0)
    if pad >= vocab_size:
        raise ConfigError(
            f"{described.file}: tokenizer.ggml.padding_token_id is {pad}, but there are"
            f" {vocab_size} tokens"
        )
    count = _need(section, "block_count")
    heads = set(_per_layer(section, "attention.head_count", count))
    if len(heads) > 1:
        raise section.wrong("attention.head_count", sorted(heads), "expected one number")
    softcap = section.number("final_logit_softcapping", 0.0)
    num_heads = heads.pop()
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=_need(section, "embedding_length"),
        num_heads=num_heads,
        layers=_layers(section, described, num_heads, unified=unified),
        experts=_experts(section),
        rope=_rope(section, described),
        eps=section.number("attention.layer_norm_rms_epsilon", 1e-6),
        softcap=softcap or None,
        ple_dim=ple_dim,
        ple_vocab_size=shapes.get("per_layer_token_embd.weight", (262_144,))[0],
        max_positions=_need(section, "context_length"),
        pad_token_id=pad,
    )


def _per_layer(section: Section, key: str, count: int) -> tuple[int, ...]:
    """A size for each layer, stored once or one by one."""
    value = section.values.get(key)
    if not isinstance(value, tuple):
        return (_need(section, key),) * count
    if len(value) != count or not all(type(n) is int and n > 0 for n in value):
        raise section.wrong(key, value, f"expected {count} sizes, one a layer")
    return value


def _layers(
    section: Section, described: Described, num_heads: int, *, unified: bool
) -> tuple[LayerConfig, ...]:
    count = _need(section, "block_count")
    kinds = _kinds(section, count)
    dims = {"full": _head_dim(section, ""), "sliding": _head_dim(section, "_swa")}
    kv_heads = _per_layer(section, "attention.head_count_kv", count)
    widths = _per_layer(section, "feed_forward_length", count)
    for heads in kv_heads:
        if num_heads % heads:
            detail = f"no multiple of the {heads} key and value heads of a layer"
            raise section.wrong("attention.head_count", num_heads, detail)
    shared = section.integer("attention.shared_kv_layers", 0)
    if shared >= count or not set(kinds) <= set(kinds[: count - shared]):
        detail = f"which leaves a kind of the {count} layers without keys and values"
        raise section.wrong("attention.shared_kv_layers", shared, detail)
    last = {kind: i for i, kind in enumerate(kinds[: count - shared])}
    sources = [i if i < count - shared else last[kind] for i, kind in enumerate(kinds)]
    ple = section.integer("embedding_length_per_layer_input", 0) > 0
    k_eq_v = not ple and _no_values(described.shapes, kinds, sources)
    window = _need(section, "attention.sliding_window")
    sight = _picture_sight(unified=unified, ple=ple, seeing=described.projector is not None)
    return tuple(
        LayerConfig(
            index=i,
            kind=kind,
            head_dim=dims[kind],
            kv_heads=kv_heads[i],
            k_eq_v=k_eq_v and kind == "full",
            intermediate_size=widths[i],
            window=window if kind == "sliding" else None,
            pictures=sight[kind],
            kv_source=sources[i],
        )
        for i, kind in enumerate(kinds)
    )


def _kinds(section: Section, count: int) -> list[LayerKind]:
    key = "attention.sliding_window_pattern"
    pattern = section.values.get(key)
    if not isinstance(pattern, tuple) or len(pattern) != count or set(pattern) - {False, True}:
        raise section.wrong(key, pattern, f"expected true or false for each of {count} layers")
    if pattern[-1]:
        raise section.wrong(key, pattern, "but the last layer of a Gemma 4 sees all tokens")
    return ["sliding" if sliding else "full" for sliding in pattern]


def _head_dim(section: Section, suffix: str) -> int:
    size = _need(section, f"attention.key_length{suffix}")
    if size % 2:
        raise section.wrong(f"attention.key_length{suffix}", size, "expected an even number")
    section.only(f"attention.value_length{suffix}", size)
    return size


def _no_values(shapes: Shapes, kinds: Sequence[LayerKind], sources: Sequence[int]) -> bool:
    """Whether none of the full layers has values of its own: they are then its keys.

    Models with inputs of their own for each layer, E2B and E4B, are never made so.
    """
    own = [i for i, kind in enumerate(kinds) if kind == "full" and sources[i] == i]
    return not any(
        f"blk.{i}.{name}.weight" in shapes for i in own for name in ("attn_v", "attn_qkv")
    )


def _picture_sight(*, unified: bool, ple: bool, seeing: bool) -> dict[LayerKind, PictureSight]:
    """As `use_bidirectional_attention` of each member's config.json says, which GGUF leaves out."""
    if unified:
        return {"sliding": "whole", "full": "whole"}
    if ple or not seeing:
        return {"sliding": "causal", "full": "causal"}
    return {"sliding": "window", "full": "causal"}


def _experts(section: Section) -> ExpertsConfig | None:
    if not section.integer("expert_count", 0):
        return None
    widths = set(_per_layer(section, "expert_feed_forward_length", _need(section, "block_count")))
    if len(widths) > 1:
        raise section.wrong("expert_feed_forward_length", sorted(widths), "expected one number")
    experts = ExpertsConfig(
        count=_need(section, "expert_count"),
        chosen=_need(section, "expert_used_count"),
        intermediate_size=widths.pop(),
    )
    if experts.chosen > experts.count:
        detail = f"but expert_count is {experts.count}"
        raise section.wrong("expert_used_count", experts.chosen, detail)
    return experts


def _rope(section: Section, described: Described) -> dict[LayerKind, RopeConfig]:
    for suffix in ("", "_swa"):  # the converter leaves still pairs to rope_freqs
        section.only(f"rope.dimension_count{suffix}", _head_dim(section, suffix))
    factors = described.rope_factors
    pairs = _head_dim(section, "") // 2
    if factors is None:
        factors = [1.0] * (pairs // 4) + [STILL] * (pairs - pairs // 4)
    moving = sum(factor == 1.0 for factor in factors)
    if list(factors) != [1.0] * moving + [factors[-1]] * (len(factors) - moving):
        moving = 0
    if not moving or (moving < len(factors) and factors[-1] < STILL * 0.99):
        raise ConfigError(
            f"{described.file}: rope_freqs.weight is not some 1.0 and then some {STILL:g}; this"
            " version computes frequencies that are kept or left out only"
        )
    if len(factors) != pairs:
        raise ConfigError(
            f"{described.file}: rope_freqs.weight has {len(factors)} entries, expected one for each"
            f" of the {pairs} pairs of a full layer's head"
        )
    return {
        "sliding": RopeConfig(theta=section.positive("rope.freq_base_swa", 10_000.0)),
        "full": RopeConfig(
            theta=section.positive("rope.freq_base", 1_000_000.0), fraction=moving / len(factors)
        ),
    }


def _special_tokens(described: Described, *, media: bool) -> SpecialTokens:
    names = {
        "image": "<|image|>",
        "image_start": "<|image>",
        "image_end": "<image|>",
        "audio": "<|audio|>",
        "audio_start": "<|audio>",
        "audio_end": "<audio|>",
        "video": "<|video|>",
    }
    wanted = set(names.values())
    tokens = described.metadata.get(TOKENS, ())
    ids = {token: id_ for id_, token in enumerate(tokens) if token in wanted}
    missing = wanted - ids.keys()
    if media and missing:
        raise ConfigError(f"{described.file}: {TOKENS} has no {sorted(missing)[0]!r}")
    return SpecialTokens(**{name: ids.get(token, -1) for name, token in names.items()})


def _axis(shapes: Shapes, tensor: str, axis: int, default: int) -> int:
    """A size by the shape of a tensor; a default where it is missing, which the plan will say."""
    shape = shapes.get(tensor, ())
    return shape[axis] if -len(shape) <= axis < len(shape) else default


def _vision(section: Section, shapes: Shapes) -> VisionConfig:
    hidden, heads = _need(section, "embedding_length"), _need(section, "attention.head_count")
    head_dim = _axis(shapes, "v.blk.0.attn_q_norm.weight", 0, hidden // heads)
    if head_dim % 4:
        raise section.wrong("attention.head_count", heads, f"with heads of {head_dim} channels")
    _unscaled(section)
    return VisionConfig(
        hidden_size=hidden,
        intermediate_size=_need(section, "feed_forward_length"),
        num_layers=_need(section, "block_count"),
        num_heads=heads,
        head_dim=head_dim,
        eps=section.number("attention.layer_norm_epsilon", 1e-6),
        rope_theta=100.0,
        patch_size=section.size("patch_size", 16),
        pooling=section.size("projector.scale_factor", 3),
        position_table_size=_axis(shapes, "v.position_embd.weight", 1, 10 * 1024),
        clipped=_clipped(shapes, "v."),
        standardize="v.std_bias" in shapes,
    )


def _unscaled(section: Section) -> None:
    """Pictures go in as numbers from 0 to 1; what a processor of another model would do is not."""
    section.only("image_mean", (0.0, 0.0, 0.0))
    section.only("image_std", (1.0, 1.0, 1.0))


def _clipped(shapes: Shapes, prefix: str) -> bool:
    return any(name.startswith(prefix) and name.endswith(".input_min") for name in shapes)


def _patches(section: Section, shapes: Shapes) -> PatchConfig:
    _unscaled(section)
    return PatchConfig(
        patch_size=section.size("patch_size", 16),
        pooling=section.size("projector.scale_factor", 3),
        hidden_size=_need(section, "embedding_length"),
        position_table_size=_axis(shapes, "v.position_embd.weight", 1, 1120),
        eps=section.number("attention.layer_norm_epsilon", 1e-6),
    )


def _audio(section: Section, shapes: Shapes) -> AudioConfig:
    hidden, heads = _need(section, "embedding_length"), _need(section, "attention.head_count")
    if hidden % heads:
        raise section.wrong("attention.head_count", heads, f"but embedding_length is {hidden}")
    section.only("feed_forward_length", 4 * hidden)
    section.only("num_mel_bins", 128)
    return AudioConfig(
        hidden_size=hidden,
        num_layers=_need(section, "block_count"),
        num_heads=heads,
        conv_channels=(
            _axis(shapes, "a.conv1d.0.weight", 0, 128),
            _axis(shapes, "a.conv1d.1.weight", 0, 32),
        ),
        conv_kernel=_axis(shapes, "a.blk.0.conv_dw.weight", -1, 5),
        residual_weight=0.5,
        chunk=12,
        left=13,
        right=0,
        logit_cap=50.0,
        eps=1e-6,  # the converter once wrote a wrong one; llama.cpp does not read it either
        gradient_clipping=1e10,
        output_size=_axis(shapes, "a.pre_encode.out.weight", 0, 1536),
        clipped=_clipped(shapes, "a."),
    )


def _frames(section: Section, shapes: Shapes) -> FrameConfig:
    del shapes  # metadata says it all
    return FrameConfig(samples=_need(section, "embedding_length"), eps=1e-6)
