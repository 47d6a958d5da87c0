"""Reads `config.json` in either of its two schemas.

Upstream moved the sizes of full-attention layers from `global_head_dim` and
`num_global_key_value_heads` into `per_layer_config`, keyed by zero-padded layer numbers. Both
become one `LayerConfig` a layer, so that nothing behind this file knows there were two. Defaults
are those of upstream's classes. Derived facts (who shares whose keys, who is double-wide) are
resolved here once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cabochon.config.architectures import DRAFTERS, TEXT_ONLY, UNIFIED, architecture_of
from cabochon.config.drafting import UNKNOWN, drafting_of
from cabochon.config.kv import kv_sources
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
from cabochon.files import read_json_object

_KINDS: dict[str, LayerKind] = {"sliding_attention": "sliding", "full_attention": "full"}


def read_config(folder: Path) -> tuple[Gemma4Config, Mapping[str, Any]]:
    """Read `folder/config.json`: the configuration, and the raw mapping it came from.

    Raises:
        ConfigError: no such file, no JSON object, or one that describes no model.
        ForeignArchitecture: it describes a model that this engine does not run.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no config.json, so it is not a checkpoint folder")
    raw = read_json_object(path)
    return parse_config(raw), raw


def parse_config(raw: Mapping[str, Any]) -> Gemma4Config:
    """The configuration that `raw`, a parsed `config.json`, describes.

    Raises:
        ConfigError: a missing or unusable value, a feature not supported.
        ForeignArchitecture: a model that this engine does not run.
    """
    architecture = architecture_of(raw)
    unified, drafter = architecture in UNIFIED, architecture in DRAFTERS
    top = Section(raw, "")
    if architecture in TEXT_ONLY and "text_config" not in raw:
        text, vision, audio = top, None, None
    else:
        text = Section(raw.get("text_config") or {}, "text_config")
        vision, audio = raw.get("vision_config"), raw.get("audio_config")
    if architecture in TEXT_ONLY | DRAFTERS:
        vision = audio = None
    see, hear = (_patches, _frames) if unified else (_vision, _audio)
    return Gemma4Config(
        architecture=architecture,
        text=_text(text, unified, drafter),
        vision=None if vision is None else see(Section(vision, "vision_config")),
        audio=None if audio is None else hear(Section(audio, "audio_config")),
        tokens=_special_tokens(top),
        drafting=drafting_of(top, text) if drafter else None,
    )


def _special_tokens(section: Section) -> SpecialTokens:
    return SpecialTokens(
        image=section.integer("image_token_id", 258_880),
        image_start=section.integer("boi_token_id", 255_999),
        image_end=section.integer("eoi_token_id", 258_882),
        audio=section.integer("audio_token_id", 258_881),
        audio_start=section.integer("boa_token_id", 256_000),
        audio_end=section.integer("eoa_token_index", 258_883),
        video=section.integer("video_token_id", 258_884),
    )


def _text(section: Section, unified: bool, drafter: bool) -> TextConfig:
    section.only("hidden_activation", "gelu_pytorch_tanh")
    section.only("attention_bias", False)
    section.only("rope_scaling")  # older models' way to say what rope_parameters says
    section.only("use_bidirectional_attention", "vision")
    softcap = section.number("final_logit_softcapping", 0.0)
    vocab_size, pad = section.size("vocab_size", 262_144), section.integer("pad_token_id", 0)
    if pad >= vocab_size:
        raise section.wrong("pad_token_id", pad, f"but vocab_size is {vocab_size}")
    num_heads = section.size("num_attention_heads", 8)
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=section.size("hidden_size", 2304),
        num_heads=num_heads,
        layers=_layers(section, unified, drafter, num_heads),
        experts=_experts(section),
        rope=_rope(section),
        eps=section.number("rms_norm_eps", 1e-6),
        softcap=softcap or None,
        ple_dim=0 if unified or drafter else _ple_dim(section),
        ple_vocab_size=section.integer("vocab_size_per_layer_input", 262_144),
        max_positions=section.size("max_position_embeddings", 262_144 if unified else 131_072),
        pad_token_id=pad,
    )


def _ple_dim(section: Section) -> int:
    """Absent, it is upstream's default; `null` is how exports write that there is none."""
    key = "hidden_size_per_layer_input"
    none = key in section.values and section.values[key] is None
    return 0 if none else section.integer(key, 256)


def _experts(section: Section) -> ExpertsConfig | None:
    if not section.flag("enable_moe_block", False):
        return None
    experts = ExpertsConfig(
        count=section.count("num_experts", 0),
        chosen=section.size("top_k_experts", 0),
        intermediate_size=section.size("moe_intermediate_size", 0),
    )
    if experts.chosen > experts.count:
        raise section.wrong("top_k_experts", experts.chosen, f"but num_experts is {experts.count}")
    return experts


def _layers(
    section: Section, unified: bool, drafter: bool, num_heads: int
) -> tuple[LayerConfig, ...]:
    kinds = _layer_kinds(section)
    k_eq_v = section.flag("attention_k_eq_v", False)
    head_dims, kv_heads = _head_sizes(section, kinds, k_eq_v)
    for count in kv_heads:
        if num_heads % count:
            detail = f"no multiple of the {count} key and value heads of a layer"
            raise section.wrong("num_attention_heads", num_heads, detail)
    shared = section.integer("num_kv_shared_layers", 0)
    sources = [UNKNOWN] * len(kinds) if drafter else _kv_sources(kinds, shared)
    window = section.size("sliding_window", 1024 if unified else 512)
    width = section.size("intermediate_size", 9216)
    double = section.flag("use_double_wide_mlp", False)
    sight = _picture_sight(section, unified)
    return tuple(
        LayerConfig(
            index=i,
            kind=kind,
            head_dim=head_dims[i],
            kv_heads=kv_heads[i],
            k_eq_v=k_eq_v and kind == "full",
            intermediate_size=2 * width if double and sources[i] != i else width,
            window=window if kind == "sliding" else None,
            pictures=sight[kind],
            shares_kv=sources[i] != i,
            kv_source=sources[i],
        )
        for i, kind in enumerate(kinds)
    )


def _picture_sight(section: Section, unified: bool) -> dict[LayerKind, PictureSight]:
    """With a tower, only sliding layers look forwards, and within the window; else all of them."""
    if section.values.get("use_bidirectional_attention", "vision" if unified else None) is None:
        return {"sliding": "causal", "full": "causal"}
    if unified:
        return {"sliding": "whole", "full": "whole"}
    return {"sliding": "window", "full": "causal"}


def _layer_kinds(section: Section) -> list[LayerKind]:
    count = section.count("num_hidden_layers", 30)
    names = section.values.get("layer_types")
    if names is None:  # upstream's default: five sliding layers, then a full one
        names = [
            "full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(count)
        ]
        names[-1] = "full_attention"
    if not isinstance(names, list) or len(names) != count:
        raise ConfigError(f"config.json: layer_types must list {count} layers, found {names!r}")
    unknown = sorted({str(name) for name in names} - set(_KINDS))
    if unknown:
        raise ConfigError(f"config.json: layer_types has {unknown}, expected {sorted(_KINDS)}")
    if names[-1] != "full_attention":
        raise ConfigError("config.json: the last of layer_types must be 'full_attention'")
    return [_KINDS[name] for name in names]


def _head_sizes(
    section: Section, kinds: list[LayerKind], k_eq_v: bool
) -> tuple[list[int], list[int]]:
    """Head size and number of key/value heads of each layer."""
    dims = [section.size("head_dim", 256, multiple=2)] * len(kinds)
    heads = [section.size("num_key_value_heads", 4)] * len(kinds)
    overrides = section.values.get("per_layer_config")
    if overrides is None:
        # `num_global_key_value_heads` has a say only where keys are values.
        full = section.size("global_head_dim", 512, multiple=2)
        full_heads = section.size("num_global_key_value_heads", heads[0]) if k_eq_v else heads[0]
        dims = [full if kind == "full" else dim for kind, dim in zip(kinds, dims, strict=True)]
        heads = [full_heads if kind == "full" else n for kind, n in zip(kinds, heads, strict=True)]
        return dims, heads
    if not isinstance(overrides, dict):
        raise ConfigError(f"config.json: per_layer_config is {overrides!r}, expected an object")
    for key, values in overrides.items():
        layer = _layer_number(key, len(kinds))
        override = Section(values, f"per_layer_config[{key!r}]")
        unknown = sorted(set(override.values) - {"head_dim", "num_key_value_heads"})
        if unknown:
            raise ConfigError(
                f"config.json: {override.name} sets {unknown}, which is not supported"
            )
        dims[layer] = override.size("head_dim", dims[layer], multiple=2)
        heads[layer] = override.size("num_key_value_heads", heads[layer])
    return dims, heads


def _layer_number(key: str, count: int) -> int:
    if not key.isdecimal() or int(key) >= count:
        raise ConfigError(
            f"config.json: per_layer_config has key {key!r}, expected 0 to {count - 1}"
        )
    return int(key)


def _kv_sources(kinds: list[LayerKind], shared: int) -> list[int]:
    if shared >= len(kinds):
        raise ConfigError(f"config.json: num_kv_shared_layers is {shared} of {len(kinds)} layers")
    sources = kv_sources(kinds, shared)
    if sources is None:
        raise ConfigError("config.json: a kind of layer shares keys and values but never makes any")
    return sources


def _rope(section: Section) -> dict[LayerKind, RopeConfig]:
    given = section.values.get("rope_parameters")
    if given is None:
        given = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1_000_000.0,
                "partial_rotary_factor": 0.25,
            },
        }
    table = Section(given, section.path("rope_parameters"))
    return {
        kind: _rope_kind(Section(table.values.get(name), table.path(name)))
        for name, kind in _KINDS.items()
    }


def _rope_kind(section: Section) -> RopeConfig:
    section.only("rope_type", "default", "proportional")
    section.only("factor", 1.0)
    fraction = section.positive("partial_rotary_factor", 1.0, most=1.0)
    if fraction != 1.0 and section.values.get("rope_type") != "proportional":
        detail = "which counts with rope_type 'proportional' only"
        raise section.wrong("partial_rotary_factor", fraction, detail)
    return RopeConfig(theta=section.positive("rope_theta", 10_000.0), fraction=fraction)


def _vision(section: Section) -> VisionConfig:
    section.only("hidden_activation", "gelu_pytorch_tanh")
    section.only("attention_bias", False)
    rope = section.inner("rope_parameters")
    rope.only("rope_type", "axial", "default")
    heads = section.size("num_attention_heads", 12)
    section.only("num_key_value_heads", heads)
    return VisionConfig(
        hidden_size=section.size("hidden_size", 768),
        intermediate_size=section.size("intermediate_size", 3072),
        num_layers=section.count("num_hidden_layers", 16),
        num_heads=heads,
        head_dim=section.size("head_dim", 64, multiple=4),  # two axes, pairs in each
        eps=section.number("rms_norm_eps", 1e-6),
        rope_theta=rope.positive("rope_theta", 100.0),
        patch_size=section.size("patch_size", 16),
        pooling=section.size("pooling_kernel_size", 3),
        position_table_size=section.size("position_embedding_size", 10 * 1024),
        clipped=section.flag("use_clipped_linears", False),
        standardize=section.flag("standardize", False),
    )


def _patches(section: Section) -> PatchConfig:
    return PatchConfig(
        patch_size=section.size("patch_size", 16),
        pooling=section.size("pooling_kernel_size", 3),
        hidden_size=section.size("mm_embed_dim", 3840),
        position_table_size=section.size("mm_posemb_size", 1120),
        eps=section.number("rms_norm_eps", 1e-6),
    )


def _audio(section: Section) -> AudioConfig:
    section.only("hidden_act", "silu")
    channels = section.values.get("subsampling_conv_channels", [128, 32])
    sizes = isinstance(channels, list) and [type(n) for n in channels] == [int, int]
    if not sizes or min(channels) < 1:
        raise section.wrong("subsampling_conv_channels", channels, "expected two sizes")
    hidden_size = section.size("hidden_size", 1024)
    num_heads = section.size("num_attention_heads", 8)
    if hidden_size % num_heads:
        raise section.wrong("num_attention_heads", num_heads, f"but hidden_size is {hidden_size}")
    return AudioConfig(
        hidden_size=hidden_size,
        num_layers=section.count("num_hidden_layers", 12),
        num_heads=num_heads,
        conv_channels=(channels[0], channels[1]),
        conv_kernel=section.size("conv_kernel_size", 5),
        residual_weight=section.number("residual_weight", 0.5),
        chunk=section.size("attention_chunk_size", 12),
        left=section.size("attention_context_left", 13),
        right=section.integer("attention_context_right", 0),
        logit_cap=section.positive("attention_logit_cap", 50.0),
        eps=section.number("rms_norm_eps", 1e-6),
        gradient_clipping=section.positive("gradient_clipping", 1e10),
        output_size=section.size("output_proj_dims", 1536),
        clipped=section.flag("use_clipped_linears", True),
    )


def _frames(section: Section) -> FrameConfig:
    return FrameConfig(
        samples=section.size("audio_embed_dim", 640), eps=section.number("rms_norm_eps", 1e-6)
    )
