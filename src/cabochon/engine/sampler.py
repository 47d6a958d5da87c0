"""Choosing the next token: penalties, temperature, top-k, top-p, min-p, and one draw.

The filters keep what transformers' logits processors keep, in the same order. The arithmetic behind
a draw is in float64 and row by row, so that a request draws the same whatever it is batched with.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cabochon.engine.request import SamplingParams

NUCLEUS_START = 256  # candidates looked at first when only top_p limits them


class Sampling:
    """One request's random numbers and, where a penalty asks for them, counts of its tokens."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        self.params = params
        # Python's generator takes a seed by its absolute value; -1 and 1 must differ.
        seed = None if params.seed is None else params.seed % (1 << 64)
        self._random = random.Random(seed)
        self._seen: Tensor | None = None  # [vocab_size] bool, in the prompt or the answer
        self._counts: Tensor | None = None  # [vocab_size] float32, in the answer
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[torch.tensor(prompt, dtype=torch.int64)] = True
        if params.presence_penalty or params.frequency_penalty:
            self._counts = torch.zeros(vocab_size)

    def observe(self, token: int) -> None:
        """Count a token that the request has generated."""
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1

    def penalize(self, logits: Tensor) -> Tensor:
        """`logits` [vocab_size] with this request's penalties; a new tensor if it has any.

        Repetition as in the CTRL paper (arXiv:1909.05858), presence and frequency as OpenAI's API
        defines them.
        """
        params = self.params
        if self._seen is not None:
            penalty = params.repetition_penalty
            less = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self._seen.to(logits.device), less, logits)
        if self._counts is not None:
            counts = self._counts.to(logits.device)
            logits = logits - params.frequency_penalty * counts
            logits = logits - params.presence_penalty * (counts > 0)
        return logits

    def draw(self, candidates: Candidates) -> int:
        """One of the candidates, by their probabilities."""
        sums = candidates.weights.cumsum(0)
        total = float(sums[-1])
        point = min(self._random.random() * total, math.nextafter(total, 0.0))
        return int(candidates.ids[torch.searchsorted(sums, point, right=True)])


class Candidates(NamedTuple):
    """Tokens that may be drawn: `ids` [n] int64 and `weights` [n] float64, not normalized."""

    ids: Tensor
    weights: Tensor


def sample(logits: Tensor, rows: Sequence[Sampling]) -> list[int]:
    """The next token of each row; `observe` is left to the caller.

    Args:
        logits: `[rows, vocab_size]` float32, not changed. No NaN: the engine ends a request whose
            logits are not finite before it comes here.
        rows: The requests, in the order of `logits`.
    """
    likeliest = logits.argmax(dim=-1).tolist()
    return [
        _next(row_logits, row, best)
        for row_logits, row, best in zip(logits, rows, likeliest, strict=True)
    ]


def _next(logits: Tensor, row: Sampling, likeliest: int) -> int:
    penalized = row.penalize(logits)
    if row.params.temperature > 0.0:
        return row.draw(candidates(penalized, row.params))
    return likeliest if penalized is logits else int(penalized.argmax())


def candidates(logits: Tensor, params: SamplingParams) -> Candidates:
    """The tokens that temperature, top-k, top-p and min-p leave, with their weights.

    Args:
        logits: `[vocab_size]` float32, after penalties.
        params: A temperature above 0.
    """
    if 0 < params.top_k < len(logits):
        # The k-th logit is found without sorting all; what ties with it stays, as upstream's does.
        least = logits.topk(params.top_k).values[-1]
        ids = (logits >= least).nonzero().squeeze(1)
    else:
        ids = torch.arange(len(logits), device=logits.device)
    exponents = (logits[ids].double() - logits.max()) / params.temperature
    kept = Candidates(ids, exponents.exp())
    if params.top_p < 1.0:
        kept = _nucleus(kept, params.top_p)
    if params.min_p > 0.0:
        enough = kept.weights >= params.min_p * kept.weights.max()
        kept = Candidates(kept.ids[enough], kept.weights[enough])
    return kept


def _nucleus(kept: Candidates, top_p: float) -> Candidates:
    """The likeliest candidates that together reach `top_p`: as few as can be, at least one."""
    wanted = top_p * float(kept.weights.sum())
    size = len(kept.ids)
    looked_at = min(NUCLEUS_START, size)
    while True:
        weights, order = kept.weights.topk(looked_at)
        sums = weights.cumsum(0)
        if looked_at == size or float(sums[-1]) >= wanted:
            break
        looked_at = min(8 * looked_at, size)
    enough = sums - weights < wanted
    return Candidates(kept.ids[order[enough]], weights[enough])
