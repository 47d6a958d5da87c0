"""Reading the small JSON files that lie beside a checkpoint's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cabochon.errors import ConfigError


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object at `path`; an empty one if there is no such file.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, expected an object")
    return values
