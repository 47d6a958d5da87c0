"""Choosing the next token: penalties, temperature, top-k, top-p, min-p, and one draw.

The filters keep what transformers' logits processors keep, in the same order. A row is worked on by
itself, so that a request draws the same whatever it is batched with, and in numpy: a row is too
small for torch's threads, whose waiting for each other costs many times the work.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cabochon.engine.request import SamplingParams, TokenLogprob
from cabochon.errors import CabochonError

Logits = npt.NDArray[np.float32]  # [vocab_size]
Allowed = npt.NDArray[np.bool_]  # [vocab_size]

NUCLEUS_START = 256  # candidates looked at first when only top_p limits them


class Candidates(NamedTuple):
    """Tokens that may be drawn: `ids` [n], and `weights` [n], probabilities times some factor."""

    ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]


class Choices(NamedTuple):
    """Logits `[n]` of the tokens `ids [n]`, in rising order; None: of all tokens."""

    logits: Logits
    ids: npt.NDArray[np.int64] | None = None


class Sampling:
    """One request's random numbers and, where a penalty asks for them, counts of its tokens."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        self.params = params
        # Python's generator takes a seed by its absolute value; -1 and 1 must differ.
        seed = None if params.seed is None else params.seed % (1 << 64)
        self._random = random.Random(seed)
        self._seen: npt.NDArray[np.bool_] | None = None  # in the prompt or the answer
        self._counts: npt.NDArray[np.int32] | None = None  # in the answer
        self._biased = np.fromiter(params.logit_bias, dtype=np.int64)
        self._biases = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        if params.repetition_penalty != 1.0:
            self._seen = np.zeros(vocab_size, dtype=np.bool_)
            self._seen[np.asarray(prompt, dtype=np.int64)] = True
        if params.presence_penalty or params.frequency_penalty:
            self._counts = np.zeros(vocab_size, dtype=np.int32)

    @property
    def count(self) -> int | None:
        """How many of the likeliest tokens decide what is drawn; None: all of them."""
        if self._seen is not None or self._counts is not None or len(self._biased):
            return None
        return 1 if self.params.temperature == 0.0 else self.params.top_k or None

    def observe(self, token: int) -> None:
        """Count a token that the request has generated."""
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1

    def penalize(self, logits: Logits) -> Logits:
        """`logits` with this request's biases and penalties; an array of its own if there are any.

        Repetition as in the CTRL paper (arXiv:1909.05858), presence and frequency as OpenAI's API
        defines them.
        """
        params = self.params
        if self._seen is None and self._counts is None and not len(self._biased):
            return logits
        logits = logits.copy()
        logits[self._biased] += self._biases
        if self._seen is not None:
            seen = np.flatnonzero(self._seen)
            before, penalty = logits[seen], params.repetition_penalty
            logits[seen] = np.where(before < 0, before * penalty, before / penalty)
        if self._counts is not None:
            used = np.flatnonzero(self._counts)
            logits[used] -= params.frequency_penalty * self._counts[used] + params.presence_penalty
        return logits

    def draw(self, among: Candidates) -> int:
        """One of the candidates, by their probabilities."""
        sums = among.weights.cumsum()
        point = min(self._random.random() * sums[-1], math.nextafter(sums[-1], 0.0))
        return int(among.ids[sums.searchsorted(point, side="right")])


def sample(choices: Choices, row: Sampling) -> int:
    """The next token of a row; `observe` is left to the caller.

    No logit is NaN: the engine ends a request whose logits are not finite before it comes here.

    Raises:
        CabochonError: no token is left.
    """
    logits, ids = choices
    if not len(logits) or logits.max() == -np.inf:
        raise CabochonError("no token may follow: what the answer must look like leaves none")
    chosen = _next(logits, row)
    return chosen if ids is None else int(ids[chosen])


def logprob(logits: Logits, token: int, alternatives: int) -> TokenLogprob:
    """The probability that the model itself gave `token`, without temperature and penalties.

    A token that may never be drawn has -inf for a logit; its probability is told as e**-9999, as
    JSON has no infinity.
    """
    highest = float(logits.max())
    total = highest + math.log(float(np.exp(logits - highest, dtype=np.float64).sum()))
    top = np.argpartition(logits, -alternatives)[len(logits) - alternatives :]
    ordered = sorted(map(int, top), key=lambda i: -logits[i])

    def told(id_: int) -> float:
        return max(float(logits[id_]) - total, -9999.0)

    return TokenLogprob(token, told(token), tuple((i, told(i)) for i in ordered))


def _next(logits: Logits, row: Sampling) -> int:
    logits = row.penalize(logits)
    if row.params.temperature == 0.0:
        return int(logits.argmax())
    return row.draw(candidates(logits, row.params))


def candidates(logits: Logits, params: SamplingParams) -> Candidates:
    """The tokens that temperature, which must not be 0, top-k, top-p and min-p leave."""
    if 0 < params.top_k < len(logits):
        # The k-th logit is found without sorting all; what ties with it stays, as upstream's does.
        least = np.partition(logits, -params.top_k)[-params.top_k]
        ids = np.flatnonzero(logits >= least)
    else:
        ids = np.arange(len(logits))
    with np.errstate(over="ignore"):  # by a temperature next to 0: all but the likeliest go
        exponents = (logits[ids].astype(np.float64) - logits.max()) / params.temperature
    kept = Candidates(ids, np.exp(exponents))
    if params.top_p < 1.0:
        kept = _nucleus(kept, params.top_p)
    if params.min_p > 0.0:
        enough = kept.weights >= params.min_p * kept.weights.max()
        kept = Candidates(kept.ids[enough], kept.weights[enough])
    return kept


def _nucleus(among: Candidates, top_p: float) -> Candidates:
    """The likeliest candidates that together reach `top_p`: as few as can be, at least one."""
    wanted = top_p * among.weights.sum()
    size = NUCLEUS_START
    while True:
        likeliest = _likeliest(among, size)
        sums = likeliest.weights.cumsum()
        if len(sums) == len(among.ids) or sums[-1] >= wanted:
            break
        size *= 8
    enough = sums - likeliest.weights < wanted
    return Candidates(likeliest.ids[enough], likeliest.weights[enough])


def _likeliest(among: Candidates, size: int) -> Candidates:
    """The `size` likeliest candidates, or all, in falling order."""
    ids, weights = among
    if size < len(ids):
        largest = np.argpartition(weights, -size)[-size:]
        ids, weights = ids[largest], weights[largest]
    order = np.argsort(-weights, kind="stable")
    return Candidates(ids[order], weights[order])
