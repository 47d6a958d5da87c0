"""The errors a user can meet. Each says what was expected, what was found, where, and what to do.

Programming errors stay asserts. The command line prints these without a traceback and ends with
`exit_code`; the server answers them as JSON with `http_status`.
"""

from __future__ import annotations


class CabochonError(Exception):
    """Base of everything a user may see."""

    exit_code = 2
    http_status = 500


class UnreadableError(CabochonError):
    """A file or folder that cannot be read as a checkpoint at all."""


class ConfigError(UnreadableError):
    """`config.json` is missing, malformed, or describes something that is not a Gemma 4."""


class LoadError(CabochonError):
    """A readable checkpoint that would not load exactly right; its text is the plan's report."""

    exit_code = 1


class MismatchError(LoadError):
    """A checkpoint that loads, in the place of another kind, or beside one it was not made for."""


class ResourceError(CabochonError):
    """A checkpoint that would load, but not on this machine."""

    exit_code = 3


class RequestError(CabochonError):
    """A request that cannot be served as asked. `param` names the offending field, if any."""

    http_status = 400

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BusyError(CabochonError):
    """More is waiting already than may wait; `seconds` says when to try again."""

    http_status = 429

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class FaultError(CabochonError):
    """A fault of ours that ended a request. The log has the whole of it."""


class NumericalError(CabochonError):
    """The model computed what is no number: for this prompt, or because its weights are damaged."""


class DeadlineError(CabochonError):
    """A request took longer than one may take."""

    http_status = 504
