"""Guesses of a drafter, which reads what its target keeps of each sequence and keeps nothing."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from cabochon.engine.cache import PAGE, PagedCache, PageTable, slots_of
from cabochon.engine.runner import Runner
from cabochon.engine.scheduler import TokenSequence
from cabochon.gemma4.drafter import Drafter
from cabochon.nn.attention import Access, attention
from cabochon.nn.kept import Store


class Drafts:
    """Guesses for the sequences of one cache, all together."""

    def __init__(self, drafter: Drafter, target: Runner, cache: PagedCache) -> None:
        self.drafter = drafter
        self._target = target
        self._cache = cache

    def __call__(self, sequences: Sequence[TokenSequence], count: int) -> list[list[int]]:
        """`count` tokens for each sequence, of which all but the latest token is computed."""
        device, dtype = self._target.device, self._target.dtype
        ends = [sequence.computed for sequence in sequences]
        past = Past(self._cache, [sequence.table for sequence in sequences], ends)
        # Guesses stand in no place of their own: upstream leaves positions as they are.
        positions = torch.tensor(ends, device=device)
        tokens = torch.tensor([sequence.tokens[-1] for sequence in sequences], device=device)
        states = torch.stack([_state(sequence) for sequence in sequences])
        embed = self._target.model.model.language_model.embed_tokens
        made = []
        for _ in range(count):
            hidden, states = self.drafter(embed(tokens, dtype), states, positions, past)
            tokens = self.drafter.likeliest(hidden)
            made.append(tokens)
        guesses: list[list[int]] = torch.stack(made, dim=1).tolist()
        return guesses


def _state(sequence: TokenSequence) -> Tensor:
    state = sequence.guesses.state
    assert state is not None, "its latest token was drawn"
    return state


class Past:
    """What lies before the next token of each sequence: the `KeyValues` of one row for each.

    A row sees what the token itself will see there, of which it is the last.
    """

    def __init__(self, cache: PagedCache, tables: Sequence[PageTable], ends: Sequence[int]) -> None:
        self._cache = cache
        self._tables = tables
        self._ends = ends
        self._accesses: list[Access] = []

    @property
    def store(self) -> Store:
        return self._cache.store

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        raise AssertionError("a drafter has no keys and values of its own")

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        group = self.store.group_of[layer]
        out = torch.empty_like(queries)
        for row, (table, end) in enumerate(zip(self._tables, self._ends, strict=True)):
            span = torch.arange(self._first(group, end), end, device=queries.device)
            slots = slots_of(table.pages[group], span)
            keys = self.store.keys[layer].read(slots, queries.dtype)
            values = self.store.values[layer].read(slots, queries.dtype)
            out[row : row + 1] = attention(queries[row : row + 1], keys, values, None)
        return out

    def accesses(self) -> Sequence[Access]:
        if not self._accesses:
            self._accesses = [self._access(group) for group in range(len(self._cache.plan.groups))]
        return self._accesses

    def _access(self, group: int) -> Access:
        pages, page_at = array("i"), array("i")
        for table, end in zip(self._tables, self._ends, strict=True):
            page_at.append(len(pages))
            pages.extend(table.pages[group][: -(-end // PAGE)])
        low = array("i", (self._first(group, end) for end in self._ends))
        return Access(array("q"), pages, page_at, low, array("i", self._ends))

    def narrow(self, rows: Sequence[int]) -> Past:
        raise AssertionError("each row of a drafter asks")

    def _first(self, group: int, end: int) -> int:
        window = self._cache.plan.groups[group].window
        return 0 if window is None else min(max(0, end - window + 1), end - 1)
