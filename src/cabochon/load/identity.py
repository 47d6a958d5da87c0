"""What model a plan is of: its name, its size, and what it can take in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cabochon.config import ExpertsConfig, Gemma4Config
from cabochon.load.tree import needed

# The released sizes, by hidden size and number of layers.
_NAMES: Mapping[tuple[int, int], str] = {
    (1536, 35): "Gemma 4 E2B",
    (2560, 42): "Gemma 4 E4B",
    (3840, 48): "Gemma 4 12B",
    (2816, 30): "Gemma 4 26B-A4B",
    (5376, 60): "Gemma 4 31B",
}


@dataclass(frozen=True, slots=True)
class Identity:
    name: str
    parameters: int
    tables: int  # of them in embedding tables, of which a token reads one row each
    active: int  # of the others, those that one token is multiplied with
    layers: int
    hidden_size: int
    context: int
    takes: tuple[str, ...]

    @classmethod
    def of(cls, config: Gemma4Config, *, has_head: bool) -> Identity:
        tree, text = needed(config, has_head=has_head), config.text
        entries = {site: site.out_features * site.in_features for site in tree.sites}
        tables = sum(count for site, count in entries.items() if site.kind == "embedding")
        experts = sum(count for site, count in entries.items() if site.kind == "experts")
        total = sum(entries.values()) + sum(math.prod(p.shape) for p in tree.parameters)
        size = (text.hidden_size, len(text.layers))
        return cls(
            name=_name(config),
            parameters=total,
            tables=tables,
            active=total - tables - _idle(experts, text.experts),
            layers=size[1],
            hidden_size=size[0],
            context=text.max_positions,
            takes=_takes(config),
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "parameters": self.parameters,
            "parameters_in_tables": self.tables,
            "parameters_active": self.active,
            "layers": self.layers,
            "hidden_size": self.hidden_size,
            "context": self.context,
            "takes": list(self.takes),
        }


def _name(config: Gemma4Config) -> str:
    text, drafting = config.text, config.drafting
    if drafting is None:
        return _NAMES.get((text.hidden_size, len(text.layers)), "a Gemma 4 of another size")
    targets = (name for (hidden, _), name in _NAMES.items() if hidden == drafting.target_size)
    target = next(targets, f"a Gemma 4 of {drafting.target_size:,}")
    return f"a drafter, which guesses for {target}"


def _idle(entries: int, experts: ExpertsConfig | None) -> int:
    return entries - entries * experts.chosen // experts.count if experts else 0


def _takes(config: Gemma4Config) -> tuple[str, ...]:
    """A drafter takes what its target has read."""
    if config.drafting is not None:
        return ()
    seen = ("pictures", "video") if config.vision is not None else ()
    return ("text", *seen, *(("sound",) if config.audio is not None else ()))
