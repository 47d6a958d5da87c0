"""What is written down: a line for each request, with its id and numbers, never its words."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from starlette.types import Scope

from cabochon.console import tell

_access = logging.getLogger("cabochon.access")

_QUIET = frozenset({"/health", "/metrics"})  # asked every few seconds by machines
MOST_OF_A_PATH = 200

_current: ContextVar[dict[str, Any] | None] = ContextVar("request", default=None)


def note(**fields: str | float | None) -> None:
    """Add to the line of the request that is being served; nothing outside of one."""
    entry = _current.get()
    if entry is not None:
        entry.update(fields)


class Entry:
    """One request's line, written when it has been answered."""

    def __init__(self, scope: Scope, request_id: str) -> None:
        self._quiet = scope["path"] in _QUIET
        self._start = time.monotonic()
        raw = scope.get("raw_path", b"")[:MOST_OF_A_PATH]
        self.fields: dict[str, Any] = {
            "request_id": request_id,
            "method": scope["method"],
            "path": raw.decode("ascii", "backslashreplace"),
        }
        _current.set(self.fields)

    def close(self, status: int) -> float:
        """Write the line."""
        seconds = time.monotonic() - self._start
        self.fields |= {"status": status, "seconds": round(seconds, 4)}
        said = "{method} {path} {status}".format_map(self.fields)
        _access.log(logging.DEBUG if self._quiet else logging.INFO, said, extra=_extra(self.fields))
        return seconds


def _extra(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"fields": dict(fields)}


class _Formatter(logging.Formatter):
    """Text: the message, then `name=value`. What names a request is not said twice."""

    said = frozenset({"method", "path", "status"})

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        rest = [f"{name}={value}" for name, value in fields.items() if name not in self.said]
        return " ".join([super().formatMessage(record), *rest])


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(self.format(record))


def set_up(level: str, form: Literal["text", "json"]) -> None:
    """Log to stderr. A log that cannot be written, on a full disk say, stops nobody."""
    handler = _Handler()
    handler.setFormatter(_JsonFormatter() if form == "json" else _Formatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what it warns of, we answer
