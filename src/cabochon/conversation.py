"""`cabochon run`: one answer, or a conversation at the terminal or through a pipe.

Does not import torch, so that a picture that cannot be opened is told at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from cabochon.engine.request import SamplingParams
from cabochon.errors import CabochonError, UnreadableError
from cabochon.gemma4.pictures import decode_picture

if TYPE_CHECKING:
    from cabochon.llm import LLM

HELP = """\
/image FILE  show a picture with the next message
/clear       forget the conversation
/exit        leave (Ctrl-D too)
/help        this text
Ctrl-C stops an answer."""


def open_picture(path: Path) -> Image.Image:
    """Read and decode one file.

    Raises:
        UnreadableError: no such file, or not readable.
        RequestError: not a picture this engine accepts.
    """
    try:
        return decode_picture(path.read_bytes())
    except OSError as error:
        raise UnreadableError(f"picture {path} cannot be read: {error.strerror}") from None
    except CabochonError as error:
        raise UnreadableError(f"picture {path}: {error}") from None


class Conversation:
    """Messages so far, and the pictures that wait for the next one."""

    def __init__(
        self, llm: LLM, params: SamplingParams, *, system: str | None = None, verbose: bool = False
    ) -> None:
        self.llm = llm
        self.params = params
        self.verbose = verbose
        self.pending: list[Image.Image] = []
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = list(self._system)

    def clear(self) -> None:
        self.messages = list(self._system)
        self.pending = []

    def say(self, text: str) -> None:
        """Send `text` with the waiting pictures; the answer goes to stdout as it comes.

        Ctrl-C keeps what was said so far as the answer, and is raised again.

        Raises:
            CabochonError: the request was refused or failed; the conversation is as before it.
        """
        parts: list[dict[str, Any]] = [{"type": "image", "image": p} for p in self.pending]
        content = [*parts, {"type": "text", "text": text}] if parts else text
        asked = [*self.messages, {"role": "user", "content": content}]
        answer: list[str] = []
        try:
            self._stream(asked, answer)
        except KeyboardInterrupt:
            self._keep(asked, answer)
            raise
        self._keep(asked, answer)

    def _keep(self, asked: Sequence[dict[str, Any]], answer: Sequence[str]) -> None:
        self.messages = [*asked, {"role": "assistant", "content": "".join(answer)}]
        self.pending = []

    def _stream(self, messages: Sequence[dict[str, Any]], answer: list[str]) -> None:
        start = time.perf_counter()
        first: float | None = None
        tokens = 0
        prompt = self.llm.prompts.chat(messages)
        with self.llm.stream(prompt, self.params) as deltas:
            for delta in deltas:
                first = first or time.perf_counter()
                tokens += len(delta.tokens)
                answer.append(delta.text)
                sys.stdout.write(delta.text)
                sys.stdout.flush()
        if not "".join(answer).endswith("\n"):
            print(flush=True)
        if self.verbose and first is not None:
            _print_speed(len(prompt.tokens), tokens, first - start, time.perf_counter() - first)


def _print_speed(prompt: int, tokens: int, first: float, rest: float) -> None:
    rate = f", then {(tokens - 1) / rest:.1f} tokens/s" if tokens > 1 and rest > 0 else ""
    print(
        f"{prompt} prompt tokens, {tokens} answered; the first after {first:.2f} s{rate}",
        file=sys.stderr,
    )


def converse(conversation: Conversation) -> int:
    """Read messages and commands from stdin to its end. The result is the exit status.

    At a terminal errors are told and forgotten; in a pipe the last one decides the status.
    """
    at_terminal = sys.stdin.isatty()
    status = 0
    if at_terminal:
        print(f"{conversation.llm.name}: /help lists commands, Ctrl-D leaves", file=sys.stderr)
    while (line := _read_line(at_terminal)) is not None and line.strip() != "/exit":
        try:
            _take(conversation, line.strip())
        except CabochonError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 0 if at_terminal else error.exit_code
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print("\n(stopped)", file=sys.stderr)
    return status


def _read_line(at_terminal: bool) -> str | None:
    if not at_terminal:
        return sys.stdin.readline() or None
    while True:
        try:
            return input(">>> " if sys.stdout.isatty() else "")
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)", file=sys.stderr)


def _take(conversation: Conversation, line: str) -> None:
    command, _, argument = line.partition(" ")
    if command == "/image" and argument:
        path = Path(argument.strip()).expanduser()
        conversation.pending.append(open_picture(path))
        print(f"{path.name} goes with the next message", file=sys.stderr)
    elif command == "/clear":
        conversation.clear()
    elif command == "/help":
        print(HELP, file=sys.stderr)
    elif command.startswith("/"):
        print(f"there is no {command!r}; /help lists commands", file=sys.stderr)
    elif line:
        conversation.say(line)
