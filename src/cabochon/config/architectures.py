"""Which architectures this engine runs, and what the others that share Gemma's names are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cabochon.errors import ConfigError, LoadError

UNIFIED = frozenset({"Gemma4UnifiedForConditionalGeneration", "Gemma4UnifiedForCausalLM"})
TEXT_ONLY = frozenset({"Gemma4ForCausalLM", "Gemma4UnifiedForCausalLM"})
DRAFTERS = frozenset({"Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"})
ARCHITECTURES = frozenset({"Gemma4ForConditionalGeneration"}) | UNIFIED | TEXT_ONLY

# The first that matches counts. Some of these have Gemma 4's tensor names and other computations.
_FOREIGN = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (
            r"Gemma4\w*Assistant\w*|gemma4-assistant|dflash|.*DSpark.*",
            "a drafter of another kind or file format than those that are read",
        ),
        (
            r"(?i:.*diffusion.*)",
            "a diffusion model, which does not write one token after the other",
        ),
        (r"(?i:.*embedding.*)", "an embedding model, which does not write text"),
        (r"Gemma4.*", "a part of Gemma 4 that does not write text"),
        (
            r"(?i:gemma[123]?)(?!4).*",
            "an earlier generation of Gemma, which is computed differently",
        ),
        (r".*", "no Gemma 4"),
    )
)


class ForeignArchitecture(LoadError):
    """A readable checkpoint of something that this engine does not run."""

    def __init__(self, architecture: str) -> None:
        what = next(what for pattern, what in _FOREIGN if pattern.fullmatch(architecture))
        known = ", ".join(sorted(ARCHITECTURES))
        super().__init__(f"{architecture!r} is {what}; this version runs {known}")
        self.architecture = architecture


def architecture_of(raw: Mapping[str, Any]) -> str:
    """The architecture that `raw`, a parsed `config.json`, names.

    Raises:
        ConfigError: it names none, or several.
        ForeignArchitecture: it names one that this engine does not run.
    """
    names = raw.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise ConfigError(f"config.json: architectures is {names!r}, expected a list of one name")
    name: str = names[0]
    if name not in ARCHITECTURES | DRAFTERS:
        raise ForeignArchitecture(name)
    return name
