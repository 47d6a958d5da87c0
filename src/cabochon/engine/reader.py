"""What an answer's tokens say: text up to a stop string, and for a model's turn its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cabochon.engine.request import Prompt
from cabochon.text.calls import ToolCall
from cabochon.text.detokenizer import Detokenizer, StopStrings
from cabochon.text.parser import Parsed, State, TurnParser
from cabochon.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Read:
    """What became certain; `stop` is the stop string that ended the answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    broken_call: bool = False
    stop: str | None = None
    thoughts: int = 0  # tokens that stood in a channel


class Reader:
    """Reads one answer. Stop strings are looked for in its text, not in reasoning or calls."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, stops: Sequence[str]) -> None:
        self._special = tokenizer.special
        self._parser = TurnParser(tokenizer, prompt.tokens) if prompt.turn else None
        self._text = Detokenizer(tokenizer)
        self._stops = StopStrings(stops)

    @property
    def state(self) -> State:
        """Where the next token stands."""
        return self._parser.state if self._parser else State.CONTENT

    def is_text(self, token: int) -> bool:
        """Whether `token`, which comes next, is of the answer's text; outside of turns all are."""
        if self._parser is None:
            return True
        return self.state is State.CONTENT and token not in self._special

    def push(self, token: int) -> Read:
        if self._parser is None:
            return self._stopped(Parsed(content=self._text.push(token)))
        thoughts = int(self.state in (State.CHANNEL, State.REASONING))
        return replace(self._stopped(self._parser.push(token)), thoughts=thoughts)

    def finish(self) -> Read:
        """What was held back, at the end of an answer."""
        rest = self._parser.finish() if self._parser else Parsed(content=self._text.flush())
        return self._stopped(rest, last=True)

    def _stopped(self, parsed: Parsed, *, last: bool = False) -> Read:
        text, met = self._stops.push(parsed.content)
        if not met and (last or parsed.calls):  # what a call follows is complete
            text += self._stops.flush()
        return Read(text, parsed.reasoning, parsed.calls, parsed.broken, self._stops.met)
