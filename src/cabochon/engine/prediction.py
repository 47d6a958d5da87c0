"""What the model says of the next token: of all tokens, or of those that a draw can fall on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cabochon.engine.sampler import Allowed, Choices, Logits
from cabochon.gemma4.model import Gemma4
from cabochon.nn.shortlist import Shortlist


class Prediction(Protocol):
    """One row of a step."""

    @property
    def finite(self) -> bool:
        """Whether all that was computed is numbers."""

    def choices(self, count: int, never: Sequence[int], allowed: Allowed | None) -> Choices:
        """Tokens that may be drawn, the `count` likeliest at least, but `never` some of them."""


class Whole:
    """All logits of a row."""

    def __init__(self, logits: Tensor) -> None:
        self.logits: Logits = logits.cpu().numpy()  # [vocab_size]

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.logits.sum()))  # one that is no number makes the sum so

    def choices(self, count: int, never: Sequence[int], allowed: Allowed | None) -> Choices:
        self.logits[list(never)] = -np.inf
        if allowed is None:
            return Choices(self.logits)
        return Choices(np.where(allowed, self.logits, np.float32(-np.inf)))


class Likeliest:
    """The largest logits of a row, which are those of `Whole` to the bit."""

    def __init__(self, model: Gemma4, shortlist: Shortlist, row: int, *, finite: bool) -> None:
        self._model = model
        self._shortlist = shortlist
        self._row = row
        self.finite = finite

    def choices(self, count: int, never: Sequence[int], allowed: Allowed | None) -> Choices:
        ids, products = self._shortlist.largest(self._row, count, never, allowed)
        if len(ids) > 1:  # the cap changes no order
            products = self._model.cap(torch.from_numpy(products)).numpy()
        return Choices(products, ids)


def predictions(model: Gemma4, hidden: Tensor, few: Sequence[bool]) -> list[Prediction]:
    """Of each row of `hidden [rows, hidden_size]`; where `few` says so, of the likeliest tokens."""
    made: dict[int, Prediction] = {}
    short = [row for row, little in enumerate(few) if little]
    if short:
        rows = hidden if len(short) == len(few) else hidden[short]
        shortlist = model.shortlist(rows)
        # One that is no number makes the sum so. In torch: 0.1 ms more.
        sums = np.add.reduce(rows.float().cpu().numpy(), axis=1).tolist()
        for place, (row, total) in enumerate(zip(short, sums, strict=True)):
            made[row] = Likeliest(model, shortlist, place, finite=math.isfinite(total))
    whole = [row for row in range(len(few)) if row not in made]
    if whole:
        logits = model.logits(hidden[whole])
        made |= {row: Whole(own) for row, own in zip(whole, logits, strict=True)}
    return [made[row] for row in range(len(few))]
