"""From the tokens of a model's turn to content, reasoning and tool calls, one token at a time.

What is structure is told by token ids alone: text that looks like a special token is text. Every
sequence of tokens is taken. The text of each token goes to one place, once:

    <|channel>thought\\n  REASONING  \\n<channel|>  CONTENT  <|tool_call> CALL <tool_call|>

Special tokens have no text. A call is handed out when it is complete; one that is malformed, or not
complete at the end, becomes content, special tokens written out, and `broken` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from cabochon.text.calls import MalformedCall, Quoted, ToolCall, parse_call
from cabochon.text.detokenizer import Detokenizer
from cabochon.text.tokenizer import Tokenizer

THOUGHT = "thought"


@dataclass(frozen=True, slots=True)
class Structure:
    """Ids of the tokens that give a turn its structure; None where the vocabulary has no such."""

    turn: int | None
    channel: int | None
    channel_end: int | None
    call: int | None
    call_end: int | None
    quote: int | None
    response: int | None  # the model stops before it: the result of a tool goes there

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Structure:
        def find(token: str) -> int | None:
            id_ = tokenizer.token_id(token)
            return id_ if id_ in tokenizer.special else None

        return cls(
            turn=find("<|turn>"),
            channel=find("<|channel>"),
            channel_end=find("<channel|>"),
            call=find("<|tool_call>"),
            call_end=find("<tool_call|>"),
            quote=find('<|"|>'),
            response=find("<|tool_response>"),
        )


class State(Enum):
    """Where in a turn the next token stands."""

    CONTENT = auto()
    CHANNEL = auto()  # its name, up to the end of the line
    REASONING = auto()
    CALL = auto()


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a token made certain."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    broken: bool = False  # the content has a call that could not be read


class TurnParser:
    """Parses one turn. `prompt` is what the turn continues: it may end inside an open channel."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = Structure.of(tokenizer)
        self._text = Detokenizer(tokenizer)
        self._name = ""  # of a channel, as far as it is known
        self._newline = ""  # held back: the last of a channel belongs to its frame
        self._call: list[int] = []
        self.state = State.CONTENT
        for token in _last_turn(prompt, self._tokens.turn):
            self.push(token)
        self._text.flush()
        self._newline = ""
        if self.state is State.CALL:
            # A call that the prompt begins is not the model's: what the model adds is text.
            self._call, self.state = [], State.CONTENT

    def push(self, token: int) -> Parsed:
        """Take the next token."""
        tokens = self._tokens
        if self.state is State.CALL:
            return self._push_call(token)
        if token == tokens.channel and self.state is State.CONTENT:
            return self._enter(State.CHANNEL)
        if token == tokens.channel_end and self.state is not State.CONTENT:
            parsed = self._sort(self._text.flush())
            self._newline = ""
            return _joined(parsed, self._enter(State.CONTENT))
        if token == tokens.call:
            parsed = self._enter(State.CALL)
            self._call = [token]
            return parsed
        return self._sort(self._text.push(token))

    def finish(self) -> Parsed:
        """What is held back, at the end of the turn."""
        if self.state is State.CALL:
            return self._end_call()
        return self._enter(State.CONTENT)

    def _enter(self, state: State) -> Parsed:
        """Hand out what belongs to the state that ends."""
        parsed = self._sort(self._text.flush())
        rest = self._newline
        if self.state is State.CHANNEL and self._name != THOUGHT:
            rest = self._name  # no name of a channel: what the model wrote, cut short
        self._name = self._newline = ""
        self.state = state
        return _joined(parsed, Parsed(reasoning=rest))

    def _sort(self, text: str) -> Parsed:
        if not text:
            return Parsed()
        if self.state is State.CONTENT:
            return Parsed(content=text)
        if self.state is State.CHANNEL:
            name, newline, text = (self._name + text).partition("\n")
            self._name = name
            if not newline and THOUGHT.startswith(name):
                return Parsed()
            self._name = ""
            self.state = State.REASONING
            if name != THOUGHT:  # a channel of another name, or of none: all of it is shown
                text = name + newline + text
        text = self._newline + text
        self._newline = "\n" if text.endswith("\n") else ""
        return Parsed(reasoning=text.removesuffix("\n"))

    def _push_call(self, token: int) -> Parsed:
        tokens = self._tokens
        if token == tokens.call_end:
            self._call.append(token)
            return self._end_call()
        if token in (tokens.call, tokens.channel):  # the one before was not closed
            parsed = self._end_call()
            self.push(token)
            return parsed
        self._call.append(token)
        return Parsed()

    def _end_call(self) -> Parsed:
        ids, self._call = self._call, []
        self.state = State.CONTENT
        try:
            if ids[-1] != self._tokens.call_end:
                raise MalformedCall("it does not end")
            return Parsed(calls=(parse_call(self._pieces(ids[1:-1])),))
        except MalformedCall:
            return Parsed(content=self._tokenizer.spell(ids), broken=True)

    def _pieces(self, ids: Sequence[int]) -> list[str | Quoted]:
        """Texts, and texts between quotes.

        Raises:
            MalformedCall: a quote that does not end, or another special token.
        """
        runs: list[list[int]] = [[]]
        for token in ids:
            if token == self._tokens.quote:
                runs.append([])
            elif token in self._tokenizer.special:
                raise MalformedCall("a special token stands in it")
            else:
                runs[-1].append(token)
        if len(runs) % 2 == 0:
            raise MalformedCall("a quote does not end")
        texts = [self._tokenizer.decode(run) for run in runs]
        return [Quoted(text) if i % 2 else text for i, text in enumerate(texts)]


def _joined(first: Parsed, second: Parsed) -> Parsed:
    return Parsed(first.content + second.content, first.reasoning + second.reasoning)


def _last_turn(prompt: Sequence[int], turn: int | None) -> Sequence[int]:
    """The tokens behind the last start of a turn; none if there is no turn."""
    for i in range(len(prompt) - 1, -1, -1):
        if prompt[i] == turn:
            return prompt[i + 1 :]
    return ()
