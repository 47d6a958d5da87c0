"""What a Gemma 4 is, as values: derived facts resolved, nothing about where it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["sliding", "full"]

# How the tokens of one picture see each other: only backwards; also forwards, within the window; or
# all of them, whatever the window.
PictureSight = Literal["causal", "window", "whole"]


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
    k_eq_v: bool  # values are the keys' projection, so that the layer has none of its own
    intermediate_size: int
    window: int | None  # tokens a query sees, itself included; None: all before it
    pictures: PictureSight
    shares_kv: bool  # has no keys and values of its own
    kv_source: int  # the layer whose keys and values it attends to; of a drafter, in its target


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """The mixture of experts that stands beside the MLP of every layer."""

    count: int
    chosen: int  # per token
    intermediate_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    num_heads: int
    layers: tuple[LayerConfig, ...]
    experts: ExpertsConfig | None
    rope: Mapping[LayerKind, RopeConfig]
    eps: float
    softcap: float | None
    ple_dim: int  # width of a layer's own input; 0: the model has no per-layer embeddings
    ple_vocab_size: int
    max_positions: int
    pad_token_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """A vision tower."""

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
    standardize: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchConfig:
    """Vision without a tower: each large patch becomes one soft token."""

    patch_size: int  # of the small patches that are merged
    pooling: int
    hidden_size: int
    position_table_size: int
    eps: float

    @property
    def pixels(self) -> int:
        return 3 * (self.patch_size * self.pooling) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioConfig:
    """A conformer over mel features."""

    hidden_size: int
    num_layers: int
    num_heads: int
    conv_channels: tuple[int, int]
    conv_kernel: int
    residual_weight: float
    chunk: int  # queries of one block
    left: int  # a query sees the `left - 2` keys before it, itself,
    right: int  # and the `right - 1` after it
    logit_cap: float
    eps: float
    gradient_clipping: float
    output_size: int
    clipped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameConfig:
    """Sound without a tower: each frame of the wave becomes one soft token."""

    samples: int
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Ids that stand for media in a prompt, and those around them."""

    image: int
    image_start: int
    image_end: int
    audio: int
    audio_start: int
    audio_end: int
    video: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """Tokens in groups of equal size, of which only the likeliest few get logits."""

    count: int
    chosen: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """What a drafter has beside layers: it proposes tokens to a larger model, its target."""

    target_size: int  # hidden size of the target
    clusters: Clusters | None  # None: every token gets a logit


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma4Config:
    architecture: str
    text: TextConfig
    vision: VisionConfig | PatchConfig | None
    audio: AudioConfig | FrameConfig | None
    tokens: SpecialTokens
    drafting: Drafting | None = None  # None: a model that stands by itself
