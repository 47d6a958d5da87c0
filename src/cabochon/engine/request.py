"""What goes into the engine and what comes out: prompts, sampling parameters, deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from cabochon.errors import CabochonError, RequestError

if TYPE_CHECKING:
    from cabochon.engine.guide import TurnRules
    from cabochon.gemma4.pictures import Picture
    from cabochon.gemma4.sounds import Sound
    from cabochon.text.calls import ToolCall

FinishReason = Literal["stop", "length"]

MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BIAS = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next token and when to end.

    `rules` leave tokens out, `logit_bias` and penalties act on the logits, then `temperature`
    divides them, then `top_k`, `top_p` and `min_p` cut the distribution, in this order.
    `temperature` 0 takes the likeliest token.

    Raises:
        RequestError: a value of another kind or out of its range, named in `param`.
    """

    max_tokens: int | None = None  # None: as many as the context holds
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0  # of tokens generated so far
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # of tokens of the prompt and generated so far
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()  # beside the model's own
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # by token id
    logprobs: int | None = None  # alternatives told beside each token's own; None: nothing is told
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    rules: TurnRules | None = None  # what the answer must look like

    def __post_init__(self) -> None:
        self._integer("max_tokens", 1, 1 << 31)
        self._integer("top_k", 0, 1 << 31)
        self._integer("seed", -(1 << 63), (1 << 63) - 1)
        self._number("temperature", 0.0, 100.0)
        self._number("top_p", 0.0, 1.0)
        self._number("min_p", 0.0, 1.0)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        self._number("repetition_penalty", 0.01, 100.0)
        if self.top_p == 0.0:
            raise RequestError("top_p is 0, expected more than 0 and at most 1", "top_p")
        lengths = [len(stop) if isinstance(stop, str) else 0 for stop in self.stops]
        if len(lengths) > MAX_STOPS or not all(0 < n <= MAX_STOP_LENGTH for n in lengths):
            raise RequestError(
                f"stop takes at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters",
                "stop",
            )
        if not all(type(token) is int for token in self.stop_token_ids):
            raise RequestError("stop_token_ids must be integers", "stop_token_ids")
        self._integer("logprobs", 0, MAX_LOGPROBS)
        self._integer("prompt_logprobs", 0, MAX_LOGPROBS)
        self._biases()

    def _biases(self) -> None:
        if len(self.logit_bias) > MAX_BIASES:
            raise RequestError(f"logit_bias takes at most {MAX_BIASES} tokens", "logit_bias")
        for token, bias in self.logit_bias.items():
            if type(token) is not int or token < 0 or not -MAX_BIAS <= bias <= MAX_BIAS:
                raise RequestError(
                    f"logit_bias maps token ids to {-MAX_BIAS:g} to {MAX_BIAS:g}", "logit_bias"
                )

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def _integer(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if value is not None and not (type(value) is int and least <= value <= most):
            raise _out_of_range(name, value, f"an integer from {least} to {most}")

    def _number(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not (real and least <= value <= most):  # false for what is no number, too
            raise _out_of_range(name, value, f"{least:g} to {most:g}")


def _out_of_range(name: str, value: object, expected: str) -> RequestError:
    return RequestError(f"{name} is {str(value)[:64]}, expected {expected}", name)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, with soft tokens for every picture and sound, and where each of them begins.

    With `turn` the answer is a turn of the model, and is parsed as one: reasoning and tool calls
    are told apart from its text.
    """

    tokens: tuple[int, ...]
    media: tuple[tuple[int, Picture | Sound], ...] = ()
    turn: bool = False


class TokenLogprob(NamedTuple):
    """A token's logarithmic probability, and the likeliest tokens in its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one request.

    `text` is what became certain: it never ends inside a character and never holds a part of a stop
    string. The last delta of a request has a `finish_reason` or an `error`.
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    error: CabochonError | None = None
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    broken_call: bool = False  # `text` has a call that could not be read
    stop: str | None = None  # the stop string that ended it
    logprobs: tuple[TokenLogprob, ...] = ()  # of tokens that are text
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # from the second token on; once
    reasoning_tokens: int = 0  # those of `tokens` that stand in a channel
    cached_tokens: int = 0  # of the prompt, whose keys and values were there already

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer to one prompt."""

    text: str
    tokens: tuple[int, ...] = field(repr=False)
    finish_reason: FinishReason
    prompt_tokens: int
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
