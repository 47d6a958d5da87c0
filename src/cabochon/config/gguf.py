"""Reads a configuration from the metadata of a GGUF model and of its projector.

The keys are those of llama.cpp's converter. What metadata does not say, shapes and the presence of
tensors do.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cabochon.config.architectures import ForeignArchitecture
from cabochon.config.drafting import UNKNOWN
from cabochon.config.gguf_towers import (
    Shapes,
    audio_of,
    axis_of,
    frames_of,
    patches_of,
    vision_of,
)
from cabochon.config.kv import kv_sources
from cabochon.config.section import Section
from cabochon.config.types import (
    Drafting,
    ExpertsConfig,
    Gemma4Config,
    LayerConfig,
    LayerKind,
    PictureSight,
    RopeConfig,
    SpecialTokens,
    TextConfig,
)
from cabochon.errors import ConfigError

ARCHITECTURE = "gemma4"
DRAFTER = "gemma4-assistant"
TOKENS = "tokenizer.ggml.tokens"
STILL = 1e30  # by what the converter divides frequencies of pairs that do not rotate

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
    "expert_weights_norm": (True,),
    "expert_gating_func": (1,),  # softmax
}


# All other keys that are read, or that say what shapes do.
_READ = frozenset(
    {
        "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
        "embedding_length_per_layer_input", "final_logit_softcapping", "expert_count",
        "expert_used_count", "expert_feed_forward_length", "attention.head_count",
        "attention.head_count_kv", "attention.key_length", "attention.key_length_swa",
        "attention.value_length", "attention.value_length_swa", "attention.shared_kv_layers",
        "attention.sliding_window", "attention.sliding_window_pattern",
        "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.freq_base_swa",
        "rope.dimension_count", "rope.dimension_count_swa", "nextn_predict_layers",
        "embedding_length_out",
    }
)  # fmt: skip


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
    if name not in (ARCHITECTURE, DRAFTER):
        raise ForeignArchitecture(name)
    if metadata.get("general.type", "model") != "model":
        kind = metadata["general.type"]
        raise ConfigError(f"{described.file}: general.type is {kind!r}, expected a model")
    if name == DRAFTER:
        return _drafter(described)
    projector = dict(described.projector or {})
    kinds = tuple(_projector_kind(projector, part) for part in ("vision", "audio"))
    if kinds not in _NAMES:
        known = " or ".join(f"{v} and {a}" if a else str(v) for v, a in list(_NAMES)[1:])
        raise ConfigError(f"{described.file}: its projector is {kinds}, expected {known}")
    text = _section(metadata, ARCHITECTURE, described.file)
    _check(text, nextn_predict_layers=0)
    towers = (vision_of, audio_of) if kinds[0] != "gemma4uv" else (patches_of, frames_of)
    see, hear = towers
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


def _drafter(described: Described) -> Gemma4Config:
    """The converter leaves clusters of tokens out: every token gets a logit."""
    text = _section(described.metadata, DRAFTER, described.file)
    _check(text, nextn_predict_layers=text.count("block_count"))
    for key in ("embedding_length_per_layer_input", "expert_count"):
        text.only(key, 0)
    return Gemma4Config(
        architecture="Gemma4AssistantForCausalLM",
        text=_text(text, described, unified=False),
        vision=None,
        audio=None,
        tokens=_special_tokens(described, media=False),
        drafting=Drafting(target_size=text.needed("embedding_length_out"), clusters=None),
    )


def _check(text: Section, **only: Any) -> None:
    for key, allowed in {**_ONLY, **{key: (value,) for key, value in only.items()}}.items():
        text.only(key, *allowed)


def unknown_keys(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of the architecture that are not read: they might change what is computed."""
    start = f"{metadata.get('general.architecture')}."
    known = _READ | _ONLY.keys()
    return tuple(
        key for key in metadata if key.startswith(start) and key[len(start) :] not in known
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


def _text(section: Section, described: Described, *, unified: bool) -> TextConfig:
    shapes, metadata = described.shapes, described.metadata
    vocab_size = axis_of(shapes, "token_embd.weight", 0, len(_tokens(described)))
    ple_dim = section.integer("embedding_length_per_layer_input", 0)
    pad = _section(metadata, "tokenizer.ggml", described.file).integer("padding_token_id", 0)
    if pad >= vocab_size:
        raise ConfigError(
            f"{described.file}: tokenizer.ggml.padding_token_id is {pad}, but there are"
            f" {vocab_size} tokens"
        )
    count = section.count("block_count")
    heads = set(_per_layer(section, "attention.head_count", count))
    if len(heads) > 1:
        raise section.wrong("attention.head_count", sorted(heads), "expected one number")
    softcap = section.number("final_logit_softcapping", 0.0)
    num_heads = heads.pop()
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=section.needed("embedding_length"),
        num_heads=num_heads,
        layers=_layers(section, described, num_heads, unified=unified),
        experts=_experts(section),
        rope=_rope(section, described),
        eps=section.number("attention.layer_norm_rms_epsilon", 1e-6),
        softcap=softcap or None,
        ple_dim=ple_dim,
        ple_vocab_size=axis_of(shapes, "per_layer_token_embd.weight", 0, 262_144),
        max_positions=section.needed("context_length"),
        pad_token_id=pad,
    )


def _tokens(described: Described) -> tuple[Any, ...]:
    tokens = described.metadata.get(TOKENS, ())
    if not isinstance(tokens, tuple):
        raise ConfigError(f"{described.file}: {TOKENS} is {tokens!r}, expected a list")
    return tokens


def _per_layer(section: Section, key: str, count: int) -> tuple[int, ...]:
    """A size for each layer, stored once or one by one."""
    value = section.values.get(key)
    if not isinstance(value, tuple):
        return (section.needed(key),) * count
    if len(value) != count or not all(type(n) is int and n > 0 for n in value):
        raise section.wrong(key, value, f"expected {count} sizes, one a layer")
    return value


def _layers(
    section: Section, described: Described, num_heads: int, *, unified: bool
) -> tuple[LayerConfig, ...]:
    count = section.count("block_count")
    kinds = _kinds(section, count)
    dims = {"full": _head_dim(section, ""), "sliding": _head_dim(section, "_swa")}
    kv_heads = _per_layer(section, "attention.head_count_kv", count)
    widths = _per_layer(section, "feed_forward_length", count)
    for heads in kv_heads:
        if num_heads % heads:
            detail = f"no multiple of the {heads} key and value heads of a layer"
            raise section.wrong("attention.head_count", num_heads, detail)
    sources = [UNKNOWN] * count if section.name == DRAFTER else _kv_sources(section, kinds)
    ple = section.integer("embedding_length_per_layer_input", 0) > 0
    k_eq_v = not ple and _no_values(described.shapes, kinds, sources)
    window = section.needed("attention.sliding_window")
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
            shares_kv=sources[i] != i,
            kv_source=sources[i],
        )
        for i, kind in enumerate(kinds)
    )


def _kv_sources(section: Section, kinds: Sequence[LayerKind]) -> list[int]:
    shared = section.integer("attention.shared_kv_layers", 0)
    sources = kv_sources(kinds, shared)
    if sources is None:
        detail = f"which leaves a kind of the {len(kinds)} layers without keys and values"
        raise section.wrong("attention.shared_kv_layers", shared, detail)
    return sources


def _kinds(section: Section, count: int) -> list[LayerKind]:
    key = "attention.sliding_window_pattern"
    pattern = section.values.get(key)
    if not isinstance(pattern, tuple) or len(pattern) != count or set(pattern) - {False, True}:
        raise section.wrong(key, pattern, f"expected true or false for each of {count} layers")
    if pattern[-1]:
        raise section.wrong(key, pattern, "but the last layer of a Gemma 4 sees all tokens")
    return ["sliding" if sliding else "full" for sliding in pattern]


def _head_dim(section: Section, suffix: str) -> int:
    size = section.needed(f"attention.key_length{suffix}")
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
    widths = set(_per_layer(section, "expert_feed_forward_length", section.count("block_count")))
    if len(widths) > 1:
        raise section.wrong("expert_feed_forward_length", sorted(widths), "expected one number")
    experts = ExpertsConfig(
        count=section.count("expert_count"),
        chosen=section.needed("expert_used_count"),
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
    ids = {token: id_ for id_, token in enumerate(_tokens(described)) if token in wanted}
    missing = wanted - ids.keys()
    if media and missing:
        raise ConfigError(f"{described.file}: {TOKENS} has no {sorted(missing)[0]!r}")
    return SpecialTokens(**{name: ids.get(token, -1) for name, token in names.items()})
