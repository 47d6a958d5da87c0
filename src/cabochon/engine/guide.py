"""Which tokens may come next in a model's turn: thinking first, then calls or the bound text.

A grammar binds the text, never the thoughts before it: it starts where the channel closes.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cabochon.engine.grammar import Grammar, Matcher
from cabochon.errors import RequestError
from cabochon.text.parser import State, Structure

Allowed = npt.NDArray[np.bool_]  # [vocab_size]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRules:
    """What an answer must look like. The default leaves all to the model, but for calls."""

    structure: Structure
    special: frozenset[int] = frozenset()  # of these the turn's own structure alone is drawn
    text: Grammar | None = None  # of the content
    calls: Grammar | None = None  # of one tool call with its tokens; None: none may be made
    must_call: bool = False
    parallel: bool = True  # more than one call
    thinking: bool = False  # thoughts may come before bound text and forced calls
    thinking_budget: int | None = None  # tokens; then the channel is closed
    may_be_empty: bool = False  # a turn without a word is an answer, of silence for example


class Guide:
    """Follows one answer. For the engine's thread."""

    def __init__(self, rules: TurnRules, ends: Iterable[int], vocab_size: int) -> None:
        self.rules = rules
        self._tokens = rules.structure
        self._ends = [end for end in ends if end < vocab_size]
        self._vocab_size = vocab_size
        # A turn of tokens without text would be an answer of nothing.
        self._frames = {token for token in rules.special if token < vocab_size} - {*self._ends}
        self._masks: dict[frozenset[int], Allowed] = {}
        self._text: Matcher | None = rules.text.start() if rules.text else None
        self._call: Matcher | None = None
        self._calls = 0
        self._thoughts = 0  # tokens
        self._begun = False  # the content has a token

    @property
    def ended(self) -> bool:
        """Whether the answer is complete: nothing may follow."""
        if self._call is not None:
            return False
        if self._calls and not self.rules.parallel:
            return True
        return self._text is not None and self._begun and self._text.ended

    def allowed(self, state: State) -> Allowed | None:
        """Which tokens may stand in a place of this kind; None leaves the choice free."""
        match state:
            case State.CALL:
                return self._call.allowed() if self._call else None
            case State.CHANNEL | State.REASONING:
                return self._thinking()
            case State.CONTENT:
                return self._content()

    def forced(self, state: State) -> list[int]:
        """Tokens of which a grammar leaves no choice from a place of this kind on."""
        if self._call is not None:
            return self._call.forced()
        if state is State.CONTENT and self._begun and self._text is not None:
            return self._text.forced()
        return []

    def take(self, token: int, state: State) -> None:
        """Go on behind `token`, which stood in a place of this kind."""
        tokens = self._tokens
        if self._call is not None:
            self._call.take(token)
            if token == tokens.call_end:
                self._call = None
                self._calls += 1
        elif token == tokens.call and self.rules.calls is not None:
            self._call = self.rules.calls.start()
            self._call.take(token)
        elif state is not State.CONTENT:
            self._thoughts += 1
        elif token != tokens.channel:
            self._begun = True
            if self._text is not None and token not in self._ends:
                self._text.take(token)

    @property
    def _bound(self) -> bool:
        return self._text is not None or (self.rules.must_call and not self._calls)

    @property
    def _fresh(self) -> bool:
        """Whether the turn has said nothing yet, beside thoughts."""
        return not self._begun and not self._calls

    @property
    def _too_early(self) -> list[int]:
        """The tokens that end a turn, where its answer would be nothing."""
        return self._ends if self._fresh and not self.rules.may_be_empty else []

    @property
    def _spent(self) -> bool:
        """Whether no more may be thought."""
        budget = self.rules.thinking_budget
        return budget is not None and self._thoughts >= budget

    def _thinking(self) -> Allowed | None:
        if self._spent:
            return self._only(self._tokens.channel_end)
        tokens = self._tokens
        if self._bound:  # a turn that owes something more does not end here
            return self._without({tokens.channel_end}, *self._ends)
        return self._without({tokens.channel_end, *self._call_token()}, *self._too_early)

    def _content(self) -> Allowed | None:
        rules, tokens = self.rules, self._tokens
        if rules.must_call:
            more = self._ends if self._calls else []
            return self._only(tokens.call, *more, *self._channel())
        if self._text is None:
            channel = set[int | None]() if self._spent else {tokens.channel}
            return self._without({*channel, *self._call_token()}, *self._too_early)
        if self._calls:  # the answer is its calls, not the text that was asked for
            return self._only(tokens.call, *self._ends)
        allowed = self._text.allowed()
        allowed[[*self._frames]] = False  # a grammar can name tokens that are no text
        if not allowed.any():
            reason = "the grammar wants a special token, but content is text alone"
            raise RequestError(reason, "response_format.grammar")
        if self._fresh:
            more = [tokens.call] if rules.calls and tokens.call is not None else []
            allowed[[*more, *self._channel()]] = True
        return allowed

    def _channel(self) -> list[int]:
        """The token that opens a channel, where thoughts are still to come."""
        open_ = self._tokens.channel
        may = self.rules.thinking and self._fresh and not self._thoughts
        return [open_] if may and open_ is not None and not self._spent else []

    def _call_token(self) -> set[int | None]:
        """The token that begins a call, where one may be made."""
        return {self._tokens.call} if self.rules.calls else set()

    def _only(self, *tokens: int | None) -> Allowed:
        allowed = np.zeros(self._vocab_size, dtype=np.bool_)
        allowed[[token for token in tokens if token is not None]] = True
        return allowed

    def _without(self, kept: Set[int | None], *tokens: int) -> Allowed:
        """All but `tokens`, and of special ones but `kept` and the ends."""
        left_out = frozenset({*self._frames - kept, *self._never(kept), *tokens})
        if left_out not in self._masks:
            self._masks[left_out] = np.ones(self._vocab_size, dtype=np.bool_)
            self._masks[left_out][sorted(left_out)] = False
        return self._masks[left_out]

    def _never(self, kept: Set[int | None]) -> set[int]:
        """Tokens of structure that have no place here, whatever the rules say of special ones."""
        openings = {self._tokens.channel, self._tokens.call}
        return {token for token in openings - kept if token is not None}
