"""From tokens to text, token by token: text is handed out when no later token can change it."""

from __future__ import annotations

from collections.abc import Sequence

from cabochon.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns one request's tokens into text as they come.

    All pushes and the flush, joined, equal `tokenizer.decode` of all the ids. The decoder changes
    each token by itself, except that neighbouring byte tokens are decoded as one run, and a single
    bad byte spoils its whole run. So a run is held back until it ends.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []  # a run of byte tokens that has not ended yet

    def push(self, token_id: int) -> str:
        """The text that `token_id` made certain; often one word, sometimes nothing."""
        if token_id in self._tokenizer.special:
            return ""  # leaves no trace in the text: bytes before and after it are one run
        token = self._tokenizer.token(token_id)
        if token is None:
            return ""
        self._held.append(token_id)
        return "" if _is_byte(token) else self.flush()

    def flush(self) -> str:
        """The text held back. After the last token, or nothing is left to say."""
        text = self._tokenizer.decode(self._held)
        self._held.clear()
        return text


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


class StopStrings:
    """Ends a request's text before the first of several strings, wherever tokens cut them.

    The first stop to be complete wins, and of several that end in the same place the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._beginnings = frozenset(stop[:n] for stop in stops for n in range(1, len(stop)))
        self._longest = max((len(stop) - 1 for stop in stops), default=0)
        self._held = ""
        self.met: str | None = None  # the stop that ended the text

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop was met: it and what follows are cut.

        What may be the beginning of a stop is held back until the text after it decides.
        """
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            _, at, self.met = min(found)
            return text[:at], True
        held = self._possible_beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        text, self._held = self._held, ""
        return text

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop."""
        for n in range(min(len(text), self._longest), 0, -1):
            if text[-n:] in self._beginnings:
                return n
        return 0
