"""Who may ask: the name a browser used for this server, the site it came from, and the key."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping
from contextvars import ContextVar

from starlette.datastructures import Headers
from starlette.types import Scope

from cabochon.serve.errors import ApiError
from cabochon.settings import Settings

# Whose request is served: the hash of the key, nothing where there are no keys.
asker: ContextVar[bytes] = ContextVar("asker", default=b"")

OPEN = "/health"  # the one path that needs no key

# A page of another site can make a browser send requests here under a name of its own that resolves
# to 127.0.0.1; the name it used is in the Host header.
_LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_PAGES = frozenset({"/", "/docs"})  # what people open; the browser asks them for the key
_FOREVER = "86400"


class Gatekeeper:
    """Refuses requests by their headers alone."""

    def __init__(self, settings: Settings) -> None:
        self.local_only = settings.loopback
        self.origins = frozenset(origin.lower() for origin in settings.allow_origins)
        self._keys = [_digest(key.encode()) for key in settings.api_keys()]

    def refusal(self, scope: Scope) -> ApiError | None:
        """Why the request is refused, if it is."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.local_only and not _LOCAL_HOST.fullmatch(host):
            return ApiError(
                403, f"this server answers to localhost, 127.0.0.1 and [::1], not to {host!r}"
            )
        origin = headers.get("origin")
        if origin is not None and not (self._allowed(origin) or _same(origin, host)):
            return ApiError(
                403,
                f"pages of {origin[:128]!r} may not use this server from a browser;"
                " allow_origins can name them",
                code="origin_not_allowed",
            )
        if not self._keys or scope["path"] == OPEN or self._known(headers):
            return None
        challenge = 'Basic realm="API key as password"' if scope["path"] in _PAGES else "Bearer"
        return ApiError(
            401,
            "this server wants its API key in the header 'Authorization: Bearer KEY'",
            headers={"www-authenticate": challenge},
        )

    def asker(self, scope: Scope) -> bytes:
        """Whose request it is, for what one must not learn of another."""
        return _digest(_given_key(Headers(scope=scope))) if self._keys else b""

    def preflight(self, scope: Scope) -> Mapping[str, str] | None:
        """The answer's headers, if the request is a browser's question whether it may ask."""
        headers = Headers(scope=scope)
        origin = headers.get("origin", "")
        asked = headers.get("access-control-request-method")
        if scope["method"] != "OPTIONS" or asked is None or not self._allowed(origin):
            return None
        return {
            **self.allowance(scope),
            "access-control-allow-methods": "GET, POST",
            "access-control-allow-headers": headers.get("access-control-request-headers", ""),
            "access-control-max-age": _FOREVER,
        }

    def allowance(self, scope: Scope) -> Mapping[str, str]:
        """What lets a page of an allowed site read the answer; nothing for any other."""
        origin = Headers(scope=scope).get("origin", "")
        if not self._allowed(origin):
            return {}
        return {
            "access-control-allow-origin": origin,
            "access-control-expose-headers": "x-request-id, retry-after",
            "vary": "origin",
        }

    def _allowed(self, origin: str) -> bool:
        return origin.lower() in self.origins

    def _known(self, headers: Headers) -> bool:
        """Whether a header holds a key. Every key is compared, so that time tells nothing."""
        given = _digest(_given_key(headers))
        found = [hmac.compare_digest(given, key) for key in self._keys]
        return any(found)


def _same(origin: str, host: str) -> bool:
    """Whether a page came from this very server; behind a proxy the scheme may differ."""
    return origin.lower().partition("://")[2] == host.lower() != ""


def _given_key(headers: Headers) -> bytes:
    """The key of a bearer, of Anthropic's clients, or what a browser's dialogue has for password.

    No key is empty, so that nothing is as good as a wrong one.
    """
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return given.strip().encode("latin-1")
    if kind.lower() == "basic":
        try:
            return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return headers.get("x-api-key", "").encode("latin-1")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
