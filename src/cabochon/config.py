"""The Gemma 4 configuration, read from `config.json` in either of its two schemas.

Upstream moved the sizes of full-attention layers from `global_head_dim` and
`num_global_key_value_heads` into `per_layer_config`, keyed by zero-padded layer numbers. Both become
one `LayerConfig` a layer, so that nothing behind this file knows there were two. Defaults are those
of upstream's classes. Derived facts (who shares whose keys, who is double-wide) are resolved here once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cabochon.errors import ConfigError

LayerKind = Literal["sliding", "full"]

ARCHITECTURES = frozenset({"Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"})

_KINDS: dict[str, LayerKind] = {"sliding_attention": "sliding", "full_attention": "full"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of one layer kind; `fraction` of the pairs rotate, the rest stay still."""

    theta: float
    fraction: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """One decoder layer."""

    index: int
    kind: LayerKind
    head_dim: int
    kv_heads: int
    intermediate_size: int
    window: int | None  # tokens a query sees, itself included; None: all before it
    kv_source: int  # the layer whose keys and values this one attends to; `index` if its own

    @property
    def shares_kv(self) -> bool:
        return self.kv_source != self.index


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    num_heads: int
    layers: tuple[LayerConfig, ...]
    rope: Mapping[LayerKind, RopeConfig]
    eps: float
    softcap: float | None
    ple_dim: int  # width of a layer's own input; 0: the model has no per-layer embeddings
    ple_vocab_size: int
    max_positions: int
    pad_token_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    eps: float
    rope_theta: float
    patch_size: int
    pooling: int  # patches per soft token and direction
    position_table_size: int
    clipped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma4Config:
    architecture: str
    text: TextConfig
    vision: VisionConfig | None
    has_audio: bool  # the configuration describes an audio tower
    image_token_id: int
    boi_token_id: int
    eoi_token_id: int


def read_config(folder: Path) -> tuple[Gemma4Config, Mapping[str, Any]]:
    """Read `folder/config.json`: the configuration, and the raw mapping it came from.

    Raises:
        ConfigError: no such file, no JSON object, or no Gemma 4 this version knows.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no config.json, so it is not a checkpoint folder") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, expected an object")
    return parse_config(raw), raw


def parse_config(raw: Mapping[str, Any]) -> Gemma4Config:
    """The configuration that `raw`, a parsed `config.json`, describes.

    Raises:
        ConfigError: another architecture, a missing or unusable value, a feature not supported.
    """
    architecture = _architecture(raw)
    wrapped = architecture == "Gemma4ForConditionalGeneration"
    text = _Section(raw.get("text_config") or {}, "text_config") if wrapped else _Section(raw, "")
    vision = raw.get("vision_config") if wrapped else None
    top = _Section(raw, "")
    return Gemma4Config(
        architecture=architecture,
        text=_text(text),
        vision=_vision(_Section(vision, "vision_config")) if vision else None,
        has_audio=wrapped and raw.get("audio_config") is not None,
        image_token_id=top.integer("image_token_id", 258_880),
        boi_token_id=top.integer("boi_token_id", 255_999),
        eoi_token_id=top.integer("eoi_token_id", 258_882),
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise ConfigError(f"config.json: architectures is {names!r}, expected a list of one name")
    if names[0] not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ConfigError(f"architecture {names[0]!r} is not supported; this version runs {known}")
    return str(names[0])


class _Section:
    """A part of `config.json` that reads values by type and names them in its errors."""

    def __init__(self, values: Any, name: str) -> None:
        if not isinstance(values, dict):
            raise ConfigError(f"config.json: {name} is {values!r}, expected an object")
        self.values = values
        self.name = name

    def _read(self, key: str, default: Any, kinds: tuple[type, ...], expected: str) -> Any:
        value = self.values.get(key, default)
        if value is None:
            value = default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            where = f"{self.name}.{key}" if self.name else key
            raise ConfigError(f"config.json: {where} is {value!r}, expected {expected}")
        return value

    def integer(self, key: str, default: int, least: int = 0) -> int:
        value: int = self._read(key, default, (int,), "an integer")
        if value < least:
            raise ConfigError(f"config.json: {self.name}.{key} is {value}, expected at least {least}")
        return value

    def size(self, key: str, default: int) -> int:
        return self.integer(key, default, least=1)

    def number(self, key: str, default: float) -> float:
        return float(self._read(key, default, (int, float), "a number"))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._read(key, default, (bool,), "true or false"))

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a value of `key` that this version does not compute; absent is always allowed."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(a) for a in allowed) or "it absent"
            raise ConfigError(
                f"config.json: {self.name}.{key} is {value!r}; this version computes {wanted} only"
            )


def _text(section: _Section) -> TextConfig:
    section.only("hidden_activation", "gelu_pytorch_tanh")
    section.only("attention_bias", False)
    section.only("enable_moe_block", False)
    section.only("attention_k_eq_v", False)
    section.only("use_bidirectional_attention")
    softcap = section.number("final_logit_softcapping", 0.0)
    return TextConfig(
        vocab_size=section.size("vocab_size", 262_144),
        hidden_size=section.size("hidden_size", 2304),
        num_heads=section.size("num_attention_heads", 8),
        layers=_layers(section),
        rope=_rope(section),
        eps=section.number("rms_norm_eps", 1e-6),
        softcap=softcap or None,
        ple_dim=section.integer("hidden_size_per_layer_input", 256),
        ple_vocab_size=section.integer("vocab_size_per_layer_input", 262_144),
        max_positions=section.size("max_position_embeddings", 131_072),
        pad_token_id=section.integer("pad_token_id", 0),
    )


def _layers(section: _Section) -> tuple[LayerConfig, ...]:
    kinds = _layer_kinds(section)
    head_dims, kv_heads = _head_sizes(section, kinds)
    sources = _kv_sources(kinds, section.integer("num_kv_shared_layers", 0))
    window = section.size("sliding_window", 512)
    width = section.size("intermediate_size", 9216)
    double = section.flag("use_double_wide_mlp", False)
    return tuple(
        LayerConfig(
            index=i,
            kind=kind,
            head_dim=head_dims[i],
            kv_heads=kv_heads[i],
            intermediate_size=2 * width if double and sources[i] != i else width,
            window=window if kind == "sliding" else None,
            kv_source=sources[i],
        )
        for i, kind in enumerate(kinds)
    )


def _layer_kinds(section: _Section) -> list[LayerKind]:
    count = section.size("num_hidden_layers", 30)
    names = section.values.get("layer_types")
    if names is None:  # upstream's default: five sliding layers, then a full one
        names = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(count)]
        names[-1] = "full_attention"
    if not isinstance(names, list) or len(names) != count:
        raise ConfigError(f"config.json: layer_types must list {count} layers, found {names!r}")
    unknown = sorted({str(name) for name in names} - set(_KINDS))
    if unknown:
        raise ConfigError(f"config.json: layer_types has {unknown}, expected {sorted(_KINDS)}")
    if names[-1] != "full_attention":
        raise ConfigError("config.json: the last of layer_types must be 'full_attention'")
    return [_KINDS[name] for name in names]


def _head_sizes(section: _Section, kinds: list[LayerKind]) -> tuple[list[int], list[int]]:
    """Head size and number of key/value heads of each layer."""
    dims = [section.size("head_dim", 256)] * len(kinds)
    heads = [section.size("num_key_value_heads", 4)] * len(kinds)
    overrides = section.values.get("per_layer_config")
    if overrides is None:
        # `num_global_key_value_heads` has a say only where keys are values, which is refused above.
        full = section.size("global_head_dim", 512)
        dims = [full if kind == "full" else dim for kind, dim in zip(kinds, dims, strict=True)]
        return dims, heads
    if not isinstance(overrides, dict):
        raise ConfigError(f"config.json: per_layer_config is {overrides!r}, expected an object")
    for key, values in overrides.items():
        layer = _layer_number(key, len(kinds))
        override = _Section(values, f"per_layer_config[{key!r}]")
        unknown = sorted(set(override.values) - {"head_dim", "num_key_value_heads"})
        if unknown:
            raise ConfigError(f"config.json: {override.name} sets {unknown}, which is not supported")
        dims[layer] = override.size("head_dim", dims[layer])
        heads[layer] = override.size("num_key_value_heads", heads[layer])
    return dims, heads


def _layer_number(key: str, count: int) -> int:
    if not key.isdecimal() or int(key) >= count:
        raise ConfigError(f"config.json: per_layer_config has key {key!r}, expected 0 to {count - 1}")
    return int(key)


def _kv_sources(kinds: list[LayerKind], shared: int) -> list[int]:
    """For each layer, the layer whose keys and values it uses: the last of its kind before sharing."""
    own = len(kinds) - shared
    if own < 1:
        raise ConfigError(f"config.json: num_kv_shared_layers is {shared} of {len(kinds)} layers")
    last = {kind: i for i, kind in enumerate(kinds[:own])}
    if not set(kinds) <= set(last):
        raise ConfigError("config.json: a kind of layer shares keys and values but never makes any")
    return [i if i < own else last[kind] for i, kind in enumerate(kinds)]


def _rope(section: _Section) -> dict[LayerKind, RopeConfig]:
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
    table = _Section(given, f"{section.name}.rope_parameters")
    return {
        kind: _rope_kind(_Section(table.values.get(name), f"{table.name}.{name}"))
        for name, kind in _KINDS.items()
    }


def _rope_kind(section: _Section) -> RopeConfig:
    section.only("rope_type", "default", "proportional")
    section.only("factor", 1.0)
    partial = section.values.get("rope_type") == "proportional"
    return RopeConfig(
        theta=section.number("rope_theta", 10_000.0),
        fraction=section.number("partial_rotary_factor", 1.0) if partial else 1.0,
    )


def _vision(section: _Section) -> VisionConfig:
    section.only("hidden_activation", "gelu_pytorch_tanh")
    section.only("attention_bias", False)
    section.only("standardize", False)
    rope = _Section(section.values.get("rope_parameters") or {}, "vision_config.rope_parameters")
    rope.only("rope_type", "axial", "default")
    heads = section.size("num_attention_heads", 12)
    section.only("num_key_value_heads", heads)
    return VisionConfig(
        hidden_size=section.size("hidden_size", 768),
        intermediate_size=section.size("intermediate_size", 3072),
        num_layers=section.size("num_hidden_layers", 16),
        num_heads=heads,
        head_dim=section.size("head_dim", 64),
        eps=section.number("rms_norm_eps", 1e-6),
        rope_theta=rope.number("rope_theta", 100.0),
        patch_size=section.size("patch_size", 16),
        pooling=section.size("pooling_kernel_size", 3),
        position_table_size=section.size("position_embedding_size", 10 * 1024),
        clipped=section.flag("use_clipped_linears", False),
    )
