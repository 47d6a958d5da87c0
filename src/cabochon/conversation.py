"""`cabochon run`: one answer, or a conversation at the terminal or through a pipe.

Does not import torch, so that a file that cannot be opened is told at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from cabochon.engine.guide import TurnRules
from cabochon.engine.request import SamplingParams
from cabochon.errors import CabochonError, RequestError, UnreadableError
from cabochon.gemma4.pictures import decode_picture
from cabochon.gemma4.sounds import Wave, decode_sound
from cabochon.gemma4.videos import check_video
from cabochon.text.parser import Structure

if TYPE_CHECKING:
    from cabochon.llm import LLM
    from cabochon.prompts import MediaKind

HELP = """\
/image FILE  show a picture with the next message
/audio FILE  let a sound be heard with it
/video FILE  show a video with it
/clear       forget the conversation
/exit        leave (Ctrl-D too)
/help        this text
Ctrl-C stops an answer."""

_COMMANDS: Mapping[str, MediaKind] = {"/image": "image", "/audio": "audio", "/video": "video"}
_NAMES: Mapping[MediaKind, str] = {"image": "picture", "audio": "sound", "video": "video"}


@dataclass(frozen=True, slots=True)
class Medium:
    """A file that goes with a message: what `Prompts` takes of it."""

    kind: MediaKind
    path: Path
    content: Image.Image | Wave | bytes


def open_medium(kind: MediaKind, path: Path) -> Medium:
    """Read one file, and decode it as far as that goes without a model.

    Raises:
        UnreadableError: no such file, not readable, or not one that this engine accepts.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableError(f"{_NAMES[kind]} {path} cannot be read: {error.strerror}") from None
    try:
        match kind:
            case "image":
                return Medium(kind, path, decode_picture(data))
            case "audio":
                return Medium(kind, path, decode_sound(data))
            case "video":
                check_video(data)
                return Medium(kind, path, data)
    except RequestError as error:
        raise _refused(kind, path, error) from None


def _refused(kind: MediaKind, path: Path, error: RequestError) -> UnreadableError:
    return UnreadableError(f"{_NAMES[kind]} {path}: {error}")


class Conversation:
    """Messages so far, and the media that wait for the next one."""

    def __init__(
        self, llm: LLM, params: SamplingParams, *, system: str | None = None, verbose: bool = False
    ) -> None:
        self.llm = llm
        self.params = replace(params, rules=_plain_turns(llm))
        self.verbose = verbose
        self._pending: list[dict[str, Any]] = []  # parts of the next message
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = list(self._system)

    def clear(self) -> None:
        self.messages = list(self._system)
        self._pending = []

    @property
    def waiting(self) -> int:
        """Media that go with the next message."""
        return len(self._pending)

    def attach(self, medium: Medium) -> None:
        """Let `medium` go with the next message.

        Raises:
            UnreadableError: the model cannot take it.
        """
        prompts = self.llm.prompts
        take: Any = {"image": prompts.picture, "audio": prompts.sound, "video": prompts.video}
        try:
            made = take[medium.kind](medium.content)
        except RequestError as error:
            raise _refused(medium.kind, medium.path, error) from None
        self._pending.append({"type": medium.kind, medium.kind: made})

    def say(self, text: str) -> None:
        """Send `text` with the waiting media; the answer goes to stdout as it comes.

        Ctrl-C keeps what was said so far as the answer, and is raised again.

        Raises:
            CabochonError: the request was refused or failed; the conversation is as before it, and
                no media wait any more, which may have been what is wrong.
        """
        parts, self._pending = self._pending, []
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


def _plain_turns(llm: LLM) -> TurnRules:
    """Neither thoughts nor calls: nobody asked for them, and nobody would see them here."""
    tokenizer = llm.prompts.tokenizer
    return TurnRules(
        structure=Structure.of(tokenizer), special=tokenizer.special, thinking_budget=0
    )


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
        waiting = conversation.waiting
        try:
            _take(conversation, line.strip())
        except CabochonError as error:
            print(f"error: {error}", file=sys.stderr)
            if conversation.waiting < waiting:
                print("(the files that were to go with it are forgotten)", file=sys.stderr)
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
    if command in _COMMANDS and argument:
        path = Path(argument.strip()).expanduser()
        conversation.attach(open_medium(_COMMANDS[command], path))
        print(f"{path.name} goes with the next message", file=sys.stderr)
    elif command in _COMMANDS:
        print(f"{command} wants a FILE; /help lists commands", file=sys.stderr)
    elif command == "/clear":
        conversation.clear()
    elif command == "/help":
        print(HELP, file=sys.stderr)
    elif command.startswith("/"):
        print(f"there is no {command!r}; /help lists commands", file=sys.stderr)
    elif line:
        conversation.say(line)
