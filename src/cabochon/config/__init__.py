"""The Gemma 4 configuration: what it is, and how it is read."""

from cabochon.config.architectures import ARCHITECTURES, DRAFTERS, ForeignArchitecture
from cabochon.config.drafting import beside
from cabochon.config.gguf import Described, parse_gguf, unknown_keys
from cabochon.config.kv import KeptLayers, kept_bytes, kept_layers
from cabochon.config.read import parse_config, read_config
from cabochon.config.types import (
    AudioConfig,
    Clusters,
    Drafting,
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

__all__ = [
    "ARCHITECTURES",
    "DRAFTERS",
    "AudioConfig",
    "Clusters",
    "Described",
    "Drafting",
    "ExpertsConfig",
    "ForeignArchitecture",
    "FrameConfig",
    "Gemma4Config",
    "KeptLayers",
    "LayerConfig",
    "LayerKind",
    "PatchConfig",
    "PictureSight",
    "RopeConfig",
    "SpecialTokens",
    "TextConfig",
    "VisionConfig",
    "beside",
    "kept_bytes",
    "kept_layers",
    "parse_config",
    "parse_gguf",
    "read_config",
    "unknown_keys",
]
