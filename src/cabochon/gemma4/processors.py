"""What a checkpoint's processor files say: values read by type, and named when they are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cabochon.errors import ConfigError
from cabochon.files import read_json_object


class Settings:
    """The settings of one processor; `owner` names it in errors. Upstream takes a null for "no"."""

    def __init__(self, values: Mapping[str, Any], owner: str) -> None:
        self._values = values
        self._owner = owner

    def choice(self, key: str, default: Any, allowed: Sequence[Any]) -> Any:
        value = self._values.get(key, default)
        # `1 == True` in Python; a switch that is a number is still a mistake.
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            raise self.unsupported(key, f"computes {' or '.join(str(a) for a in allowed)} only")
        return value

    def size(self, key: str, default: int) -> int:
        value = self._values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.unsupported(key, "expects a positive integer")
        return value

    def number(self, key: str, default: float, *, least: float = 0.0, hint: str = "") -> float:
        """A finite number above `least`."""
        value = self._values.get(key, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not least < value < math.inf:
            raise self.unsupported(key, f"expects a number above {least:g}{hint}")
        return float(value)

    def maybe(self, key: str, default: float | None) -> float | None:
        """A finite number above 0, or null."""
        return None if self._values.get(key, default) is None else self.number(key, default or 0.0)

    def unsupported(self, key: str, wanted: str) -> ConfigError:
        found = repr(self._values[key]) if key in self._values else "absent"
        return ConfigError(f"the {self._owner}'s {key} is {found}; this version {wanted}")


def read_settings(folder: Path, section: str, *older: str) -> Mapping[str, Any]:
    """Raw settings: the section of `processor_config.json`, else the first of the older files.

    Empty where there is none of them.

    Raises:
        ConfigError: a file that is no JSON object.
    """
    nested = read_json_object(folder / "processor_config.json").get(section)
    if nested is None:
        paths = [folder / name for name in older]
        return next((read_json_object(path) for path in paths if path.exists()), {})
    if not isinstance(nested, dict):
        raise ConfigError(f"processor_config.json: {section} is {nested!r}, not an object")
    return nested
