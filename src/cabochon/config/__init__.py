"""The Gemma 4 configuration: what it is, and how it is read."""

from cabochon.config.read import ARCHITECTURES, parse_config, read_config
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

__all__ = [
    "ARCHITECTURES",
    "AudioConfig",
    "ExpertsConfig",
    "FrameConfig",
    "Gemma4Config",
    "LayerConfig",
    "LayerKind",
    "PatchConfig",
    "PictureSight",
    "RopeConfig",
    "SpecialTokens",
    "TextConfig",
    "VisionConfig",
    "parse_config",
    "read_config",
]
