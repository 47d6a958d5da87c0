"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from cabochon.errors import (
    BusyError,
    CabochonError,
    FaultError,
    NumericalError,
    RequestError,
)

_KINDS: Mapping[int, tuple[str, str | None]] = {  # status → type and code, in OpenAI's words
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("invalid_request_error", "host_not_allowed"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "queue_full"),
    503: ("server_error", "unavailable"),
    504: ("server_error", "deadline_exceeded"),
}

_OURS = "the engine failed at this request; the server's log says why"


class ApiError(CabochonError):
    """A request that is refused with a status other than 400, or with a code of its own."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.http_status = status
        self.param = param
        self.code = code
        self.headers = headers


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    kind, usual = _KINDS.get(status, ("server_error", "internal_error"))
    return {"error": {"message": message, "type": kind, "param": param, "code": code or usual}}


def describe(error: CabochonError) -> dict[str, Any]:
    """The body for an error that a client may see."""
    param = error.param if isinstance(error, ApiError | RequestError) else None
    code = error.code if isinstance(error, ApiError) else None
    if isinstance(error, NumericalError):
        code = "numerical_error"
    # What an exception says may hold addresses, paths or somebody else's words.
    said = _OURS if isinstance(error, FaultError) else str(error)
    return error_body(error.http_status, said, param=param, code=code)


def error_response(error: CabochonError) -> JSONResponse:
    headers = error.headers if isinstance(error, ApiError) else None
    if isinstance(error, BusyError):
        headers = {"retry-after": str(error.seconds)}
    return JSONResponse(describe(error), status_code=error.http_status, headers=headers)
