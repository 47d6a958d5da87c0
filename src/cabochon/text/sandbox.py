"""A chat template in a process of its own, so that time, memory and files really are out of reach.

Jinja's sandbox alone does not bound a template: one multiplication, or a list that holds itself
forty times over, is a single step for Python and can take all memory or go on forever.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cabochon.errors import CabochonError, ConfigError, RequestError

TIME_LIMIT = 5.0  # seconds for one rendering
REPLY_LIMIT = 128_000_000  # bytes; JSON may take twelve for a character

_SCRIPT = Path(__file__).with_name("renderer.py")
# What Python needs to start and to know the local time; secrets of the environment stay here.
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")


class Renderer:
    """One compiled template; threads take turns. A process that was ended is started again.

    `variables` are the names that the template takes from outside.

    Raises:
        ConfigError: the template does not compile.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        self._lock = threading.Lock()
        self._start()

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for `variables`. What JSON cannot hold (a picture) is shown to it by type name.

        Raises:
            RequestError: the template refuses these variables, fails on them, or takes too much.
        """
        try:
            question = json.dumps(variables, default=_type_name)
        except (RecursionError, TypeError, ValueError) as error:
            raise RequestError(f"the messages are not JSON: {error}", "messages") from None
        with self._lock:
            if self._process.poll() is not None:
                self._start()
            answer = self._ask(question)
        text = answer.get("text")
        if not isinstance(text, str):
            raise RequestError(f"the chat template cannot be used: {answer['error']}", "messages")
        return text

    def close(self) -> None:
        """End the process, unless it is rendering: then it ends with this object."""
        if self._lock.acquire(timeout=TIME_LIMIT):
            self._end()
            self._lock.release()

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,  # an interrupt from the keyboard is not for it
            )
        except OSError as error:
            raise CabochonError(
                f"no process for the chat template can be started: {error}"
            ) from None
        self._end = weakref.finalize(self, _end, self._process)
        answer = self._ask(json.dumps({"template": self._template}))
        if "error" in answer:
            self._end()
            raise ConfigError(f"the chat template does not compile: {answer['error']}")
        self.variables = frozenset(answer["variables"])

    def _ask(self, question: str) -> Mapping[str, Any]:
        """The process's answer, or an error of ours if it gives none in time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        alarm = threading.Timer(TIME_LIMIT, self._process.kill)
        alarm.start()
        line = b""
        with suppress(OSError):  # it died; the missing answer says so
            self._process.stdin.write(question.encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline(REPLY_LIMIT)
        late = not alarm.is_alive()
        alarm.cancel()
        if line.endswith(b"\n"):
            answer: Mapping[str, Any] = json.loads(line)
            return answer
        self._end()
        return {"error": f"it takes longer than {TIME_LIMIT:g} s" if late else "its process died"}


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {**kept, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):  # what it was not told in time is of no use any more
                stream.close()
    process.wait()


def _type_name(value: object) -> str:
    return f"<{type(value).__name__}>"
