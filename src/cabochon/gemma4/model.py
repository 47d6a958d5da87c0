"""The whole model: towers and text decoder under the checkpoint's own names, head and soft-cap."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cabochon.config import AudioConfig, Gemma4Config, VisionConfig
from cabochon.gemma4.audio import AudioTower
from cabochon.gemma4.embedders import PatchEmbedder, SoftTokenEmbedder
from cabochon.gemma4.text import TextModel
from cabochon.gemma4.vision import VisionTower
from cabochon.nn.attention import KeyValues
from cabochon.nn.linear import Linear
from cabochon.nn.shortlist import Shortlist
from cabochon.nn.softcap import SoftCap


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input: the rows of all its sequences, one after the other."""

    tokens: Tensor  # [tokens]; the padding id where a picture or a sound stands
    positions: Tensor  # [tokens], within each sequence
    soft_at: Tensor  # [soft tokens], rows that a picture or a sound fills
    soft: Tensor  # [soft tokens, hidden_size]; its dtype is the compute dtype
    wanted: Tensor | None  # [rows], sorted: whose logits to compute; None: all


class Gemma4Model(nn.Module):
    """What lies under the checkpoint's `model.`."""

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        hidden = config.text.hidden_size
        self.language_model = TextModel(config.text)
        vision, audio = config.vision, config.audio
        if isinstance(vision, VisionConfig):
            self.vision_tower = VisionTower(vision)
            self.embed_vision = SoftTokenEmbedder(vision.hidden_size, hidden, vision.eps)
        elif vision is not None:
            self.vision_embedder = PatchEmbedder(vision)
            self.embed_vision = SoftTokenEmbedder(vision.hidden_size, hidden, vision.eps)
        if isinstance(audio, AudioConfig):
            self.audio_tower = AudioTower(audio)
            self.embed_audio = SoftTokenEmbedder(audio.output_size, hidden, audio.eps)
        elif audio is not None:
            self.embed_audio = SoftTokenEmbedder(audio.samples, hidden, audio.eps)


class Gemma4(nn.Module):
    """A Gemma 4. Built on the meta device; the loader gives it its weights.

    `has_head` says whether the file brings an `lm_head` of its own. Without one, the token table is
    the head: whether embeddings are tied is read from the file, not from the configuration.
    """

    def __init__(self, config: Gemma4Config, *, has_head: bool) -> None:
        super().__init__()
        self.config = config
        self.model = Gemma4Model(config)
        if has_head:
            self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size)
        self.has_head = has_head
        self.cap = SoftCap(config.text.softcap)

    def forward(self, batch: Batch, kv: KeyValues) -> Tensor:
        """What the wanted rows' logits are made of: `[rows, hidden_size]`."""
        text = self.model.language_model
        x = text.embed_tokens(batch.tokens, batch.soft.dtype)
        if len(batch.soft):
            x = x.index_copy(0, batch.soft_at, batch.soft)
        hidden: Tensor = text(batch.tokens, x, batch.positions, kv, batch.wanted)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """After the soft-cap: `[rows, vocab_size]`, float32."""
        head = (
            self.lm_head if self.has_head else self.model.language_model.embed_tokens.weight.linear
        )
        return self.cap(head(hidden).float())

    def shortlist(self, hidden: Tensor) -> Shortlist:
        """The largest logits of each row, before the soft-cap."""
        head = self.lm_head if self.has_head else self.model.language_model.embed_tokens
        return head.weight.shortlist(hidden, self.cap)

    def see(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """Soft tokens `[m, hidden_size]` of one picture: patches `[n, pixels]` at `[n, 2]`."""
        model = self.model
        tower = isinstance(self.config.vision, VisionConfig)
        encoder = model.vision_tower if tower else model.vision_embedder
        return model.embed_vision(encoder(pixels, positions))

    def hear(self, frames: Tensor) -> Tensor:
        """Soft tokens `[m, hidden_size]` of one sound: `[frames, bins]`, or frames of the wave."""
        model = self.model
        if isinstance(self.config.audio, AudioConfig):
            frames = model.audio_tower(frames)
        return model.embed_audio(frames)
