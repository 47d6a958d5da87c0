"""Grammars by llguidance: what text, regular expression, JSON schema or grammar lets follow.

Compiling can take long and much memory, so it is bounded, and is for a thread that may be kept
waiting. What cannot be compiled, or not exactly, is an error: an answer is never left unbound.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from cabochon.errors import RequestError
from cabochon.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SOURCE = 200_000  # characters of one grammar
# llguidance descends into each rule, and where a stack ends, so does the process. The deepest chain
# of rules in `MAX_SOURCE` takes 80 MB of it; what is not used costs addresses alone.
STACK = 256 * 2**20

Made = TypeVar("Made")
_starting = threading.Lock()

# One space, or one line's indentation: a model that may write more does so without end at times.
_JSON_OPTIONS: JsonCompileOptions = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_pattern": r"(?: |\n {0,32})?",
}


class Grammars:
    """Compiles grammars for one tokenizer; threads may share it.

    Args:
        vocab_size: Of the model's logits.
        ends: Tokens that may end an answer where its grammar lets it end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Iterable[int]) -> None:
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._ends = sorted(ends)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def json_object(self) -> Grammar:
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any], where: str = "json_schema") -> Grammar:
        """JSON that `schema` allows.

        Raises:
            RequestError: no schema, or one with keywords that cannot be enforced.
        """
        try:
            source = json.dumps(schema)
            text = _deep(
                lambda: LLMatcher.grammar_from_json_schema(source, overrides=_JSON_OPTIONS)
            )
        except (ValueError, TypeError, RecursionError) as error:
            raise _refusal("JSON schema", error, where) from None
        return self._compile(text, "JSON schema", where)

    def regex(self, pattern: str, where: str = "regex") -> Grammar:
        """Text that the whole of `pattern` matches."""
        return self._compile(LLMatcher.grammar_from_regex(pattern), "regular expression", where)

    def lark(self, grammar: str, where: str = "grammar") -> Grammar:
        """Text that a grammar in llguidance's dialect of Lark derives."""
        return self._compile(LLMatcher.grammar_from_lark(grammar), "grammar", where)

    def _compile(self, source: str, kind: str, where: str) -> Grammar:
        if len(source) > MAX_SOURCE:
            raise RequestError(f"the {kind} is longer than {MAX_SOURCE:,} characters", where)
        return _deep(lambda: self._compiled(source, kind, where))

    def _compiled(self, source: str, kind: str, where: str) -> Grammar:
        tokenizer = self._llguidance()
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=_limits())
        if not matcher.is_error():
            # The first step is taken here: what it finds is still the client's to hear as a 400.
            first = matcher.deep_copy()
            first.compute_bitmask()
            if not first.is_error():
                return Grammar(matcher, tokenizer.vocab_size)
            matcher = first
        raise _refusal(kind, matcher.get_error(), where)

    def _llguidance(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(
                    self._source.as_json(), n_vocab=self._vocab_size, eos_token=self._ends
                )
            return self._tokenizer


def _deep(work: Callable[[], Made]) -> Made:
    """`work()`, in a thread with a deep stack."""
    with _starting:  # the size is the process's, of all threads that start meanwhile
        before = threading.stack_size(STACK)
        try:
            pool = ThreadPoolExecutor(1)
            made = pool.submit(work)
        finally:
            threading.stack_size(before)
    with pool:
        return made.result()


def _limits() -> LLParserLimits:
    return LLParserLimits(
        max_grammar_size=200_000,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=200_000,
        max_lexer_states=100_000,
        step_max_items=50_000,
        max_items_in_row=20_000,
    )


def _refusal(kind: str, error: object, where: str) -> RequestError:
    reason = " ".join(_first_lines(error).split()) or "nothing can be written by it"
    return RequestError(f"the {kind} cannot be compiled: {reason[:300]}", where)


def _first_lines(error: object) -> str:
    """What llguidance says, without the state of its parser behind it."""
    return str(error).partition("<state>")[0].strip().removesuffix("NoExtensionBias")


class Grammar:
    """A compiled grammar; `start` gives a matcher of it for one answer."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def start(self) -> Matcher:
        return Matcher(self._matcher.deep_copy(), self._vocab_size)


class Matcher:
    """Follows one answer through its grammar. For one thread."""

    def __init__(self, inner: LLMatcher, vocab_size: int) -> None:
        self._inner = inner
        self._vocab_size = vocab_size

    @property
    def ended(self) -> bool:
        """Whether nothing may follow any more."""
        return bool(self._inner.is_stopped())

    def allowed(self) -> npt.NDArray[np.bool_]:
        """For each token of the vocabulary, whether it may come next.

        Raises:
            RequestError: the grammar took more work than it may.
        """
        mask = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(mask, bitorder="little")[: self._vocab_size].astype(np.bool_)

    def forced(self) -> list[int]:
        """Tokens that must come next, as text would be cut into them; none where there is a choice.

        The model may still cut the same text otherwise.
        """
        return self._inner.compute_ff_tokens()

    def take(self, token: int) -> None:
        """Go on behind `token`, which is one of the allowed."""
        self._inner.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._inner.is_error():
            reason = _first_lines(self._inner.get_error())
            raise RequestError(f"the grammar cannot be followed: {reason[:300]}")
