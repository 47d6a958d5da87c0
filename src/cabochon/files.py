"""The checkpoint that comes with the package, and the small JSON files of any checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from cabochon.errors import CabochonError, ConfigError

DEMO = Path(__file__).parent / "demo"


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object at `path`; an empty one if there is no such file.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    if not path.is_file():
        return {}
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def write_text(path: Path, text: str) -> None:
    """Write a file that a user asked for.

    Raises:
        CabochonError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CabochonError(f"{path} cannot be written: {error.strerror}") from None


def check_writable(path: Path) -> None:
    """Find before long work that its result could not be kept.

    Raises:
        CabochonError: there is no folder for it, or a folder stands in its place.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise CabochonError(f"{path} cannot be written: {reason}")


def parse_json(text: bytes) -> Any:
    """`text` as JSON, strictly: Python's parser alone would take more than the format allows.

    Raises:
        ValueError: it is malformed, nested too deep, names a member twice (most parsers would
            silently keep the last) or has NaN or Infinity for a number.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r} appears twice")
            seen.add(name)
    return members


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number in JSON")
