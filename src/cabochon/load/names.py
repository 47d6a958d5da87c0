"""Where a stored tensor belongs: spellings of module paths, places, and tensors left out.

Name tables map module paths only; what follows a site's name, the leaf, belongs to its scheme.
Whole path components are matched, never substrings.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import NamedTuple

from cabochon.config import Gemma4Config
from cabochon.load.tree import CLIP_BOUNDS

# Prefixes met in files, and the canonical ones; the longest that matches counts.
_SPELLINGS = (
    ("model.language_model.model", "model.language_model"),  # some importers
    ("model.language_model.lm_head", "lm_head"),
    ("model.language_model", "model.language_model"),  # multimodal, as upstream saves it
    ("language_model.model", "model.language_model"),  # MLX, and engines' own
    ("language_model.lm_head", "lm_head"),
    ("model.vision_tower", "model.vision_tower"),
    ("model.audio_tower", "model.audio_tower"),
    ("model.embed_vision", "model.embed_vision"),
    ("model.embed_audio", "model.embed_audio"),
    ("vision_tower", "model.vision_tower"),
    ("audio_tower", "model.audio_tower"),
    ("embed_vision", "model.embed_vision"),
    ("embed_audio", "model.embed_audio"),
    ("model", "model.language_model"),  # text-only export
    ("lm_head", "lm_head"),
)


class Place(NamedTuple):
    """A stored tensor's destination: a site and its leaf, or a parameter with an empty leaf."""

    module: str
    leaf: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Tensors, by canonical name, that are known and not used, and why."""

    pattern: re.Pattern[str]
    reason: str


def canonical(name: str) -> str:
    """`name` with its wrapper prefix replaced; a name with none of them stays as it is."""
    for spelling, prefix in _SPELLINGS:
        if name == spelling or name.startswith(spelling + "."):
            return prefix + name[len(spelling) :]
    return name


def locate(name: str, sites: Container[str], parameters: Container[str]) -> Place | None:
    """The place of the canonical `name`; None if the model has none."""
    if name in parameters:
        return Place(name, "")
    module = name
    while "." in module:
        module = module.rpartition(".")[0]
        if module in sites:
            return Place(module, name[len(module) + 1 :])
    return None


def drops(config: Gemma4Config) -> tuple[Drop, ...]:
    """What this configuration makes superfluous. None of it may name anything the model needs."""
    rows = [
        (r"model\.(audio_tower|embed_audio)\..+", "sound is not supported yet"),
        (
            r"model\.embed_vision\.(embedding|hard_embedding_norm|soft_embedding_norm)\..+",
            "a vestige that upstream's model does not read either",
        ),
        (
            r"model\.language_model\.layers\.\d+\.self_attn\.[kv]_(cache_)?scale",
            "scales of a quantized KV cache; keys and values are kept in the compute dtype",
        ),
    ]
    sharing = [str(layer.index) for layer in config.text.layers if layer.shares_kv]
    if sharing:
        layers = "|".join(sharing)
        rows.append(
            (
                rf"model\.language_model\.layers\.({layers})\.self_attn\.[kv]_(proj|norm)\..+",
                "these layers use the keys and values of an earlier one",
            )
        )
    if config.vision is not None and not config.vision.clipped:
        bounds = "|".join(CLIP_BOUNDS)
        rows.append((rf"model\.vision_tower\..+\.({bounds})", "use_clipped_linears is false"))
    return tuple(Drop(re.compile(pattern), reason) for pattern, reason in rows)
