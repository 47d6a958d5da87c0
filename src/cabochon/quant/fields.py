"""Fields of quantization configurations, checked while they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import regex

from cabochon.errors import ConfigError
from cabochon.quant.claims import Targets

MAX_PATTERNS = 1000  # of a list; each is tried on each matrix

KV_NOTE = "kv_cache_scheme is not used: keys and values are kept in the compute dtype"


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {name} is {value!r}, expected an object")
    return value


def integer(config: Mapping[str, Any], key: str, name: str) -> int | None:
    """A whole number, or None where there is none."""
    value = config.get(key)
    if value is not None and type(value) is not int:
        raise ConfigError(f"config.json: {name}.{key} is {value!r}, expected a whole number")
    return value


def strings(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"config.json: {name} is {value!r}, expected a list of names")
    return tuple(value)


def targets(value: Any, name: str) -> Targets:
    found = Targets.of(strings(value, name))
    if len(found.patterns) > MAX_PATTERNS:
        count = len(found.patterns)
        raise ConfigError(f"config.json: {name} has {count} patterns, more than {MAX_PATTERNS}")
    return found


def unconverted(value: Any, name: str) -> Targets:
    """Modules that transformers was told not to convert; None tells it of none."""
    return targets([f"skip:{entry}" for entry in strings(value or [], name)], name)


def containing(parts: Iterable[str], name: str) -> Targets:
    """All modules that have one of `parts` anywhere in their names."""
    return targets([f"re:.*{regex.escape(part)}" for part in parts], name)
