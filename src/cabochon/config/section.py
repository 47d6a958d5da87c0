"""A part of a configuration that reads values by type and names them in its errors."""

from __future__ import annotations

import math
import sys
from typing import Any

from cabochon.errors import ConfigError

MOST = 4096  # layers, or experts of one: each becomes an object, and the file may be damaged


class Section:
    """One object of the file; `name` is its path in it, empty for the whole."""

    def __init__(self, values: Any, name: str, file: str = "config.json") -> None:
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: {name} is {values!r}, expected an object")
        self.values = values
        self.name = name
        self.file = file

    def path(self, key: str) -> str:
        """Where `key` is in the file: `text_config.hidden_size`."""
        return f"{self.name}.{key}" if self.name else key

    def inner(self, key: str) -> Section:
        """The object under `key`; an empty one if it is absent."""
        return Section(self.values.get(key) or {}, self.path(key), self.file)

    def wrong(self, key: str, found: Any, detail: str) -> ConfigError:
        """The error that the value of `key` cannot be used."""
        return ConfigError(f"{self.file}: {self.path(key)} is {found!r}, {detail}")

    def _read(self, key: str, default: Any, kinds: tuple[type, ...], expected: str) -> Any:
        value = self.values.get(key, default)
        if value is None:
            value = default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.wrong(key, value, f"expected {expected}")
        return value

    def integer(self, key: str, default: int, least: int = 0) -> int:
        value: int = self._read(key, default, (int,), "an integer")
        if value < least:
            raise self.wrong(key, value, f"expected at least {least}")
        return value

    def size(self, key: str, default: int, multiple: int = 1) -> int:
        value = self.integer(key, default, least=1)
        if value % multiple:
            kind = "an even number" if multiple == 2 else f"a multiple of {multiple}"
            raise self.wrong(key, value, f"expected {kind}")
        return value

    def needed(self, key: str) -> int:
        """A size that has no default."""
        if key not in self.values:
            raise self.wrong(key, None, "expected a size; the model cannot be told without it")
        return self.size(key, 1)

    def count(self, key: str, default: int | None = None) -> int:
        """How many layers or experts there are; without a default, it is needed."""
        value = self.needed(key) if default is None else self.size(key, default)
        if value > MOST:
            raise self.wrong(key, value, f"expected at most {MOST}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number that is not negative."""
        value = self._read(key, default, (int, float), "a number")
        if not 0 <= value <= sys.float_info.max:
            raise self.wrong(key, value, "expected a finite number, 0 or more")
        return float(value)

    def positive(self, key: str, default: float, most: float = math.inf) -> float:
        value = self.number(key, default)
        if not 0 < value <= most:
            limit = "" if most == math.inf else f" and at most {most:g}"
            raise self.wrong(key, value, f"expected more than 0{limit}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._read(key, default, (bool,), "true or false"))

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a value of `key` that this version does not compute; absent is always allowed."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(a) for a in allowed) or "it absent"
            raise ConfigError(
                f"{self.file}: {self.path(key)} is {value!r}; this version computes {wanted} only"
            )
