"""The paged key/value cache: one pool a kind of layer, pages handed out, shared and taken back.

Layers of the same window and head sizes form a group and share page numbers. A group with a window
gives its pages back as they fall out of it. Layers that share keys and values own no pages: they
read their source's.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.config import KeptLayers, TextConfig, kept_layers
from cabochon.engine.pool import Name, Named, PagePool
from cabochon.errors import CabochonError
from cabochon.nn.attention import Access, Spans, attention, seen, visible
from cabochon.nn.kept import Kept, Store

PAGE = 16  # tokens

_FREED = -1  # a page that fell out of the window


@dataclass(frozen=True, slots=True)
class Group(KeptLayers):
    """Layers that share page numbers."""

    def page_bytes(self, dtype: torch.dtype) -> int:
        return PAGE * self.token_bytes(dtype.itemsize)

    def pages_for(self, length: int, batch: int, step: int) -> int:
        """The most pages that `batch` sequences of `length` tokens hold, `step` tokens at a time.

        Behind a window a sequence keeps two cut pages beside whole ones, and the step's own tokens
        come on top, whoever they belong to.
        """
        everything = batch * -(-length // PAGE)
        if self.window is None:
            return everything
        return min(everything, batch * (-(-self.window // PAGE) + 2) + -(-step // PAGE))


def cache_groups(config: TextConfig) -> tuple[Group, ...]:
    return tuple(
        Group(kept.window, kept.kv_heads, kept.head_dim, kept.pictures, kept.layers)
        for kept in kept_layers(config)
    )


@dataclass(frozen=True, slots=True)
class CachePlan:
    """How many pages each group gets, and what they hold together."""

    groups: tuple[Group, ...]
    pages: tuple[int, ...]
    max_batch: int  # sequences whose windows fit at once
    max_context: int  # tokens of the longest sequence
    longest_step: int  # tokens of one sequence computed at once

    @classmethod
    def fit(
        cls,
        config: TextConfig,
        dtype: torch.dtype,
        budget: int,
        max_batch: int,
        step: int,
        max_context: int | None = None,
    ) -> CachePlan:
        """Divide `budget` bytes: up to half for `max_batch` windows, the rest for full attention.

        Raises:
            CabochonError: the model knows no context so long, or the budget holds not even one
                sequence of two steps.
        """
        groups = cache_groups(config)
        wanted = max_context or config.max_positions
        if wanted > config.max_positions:
            raise CabochonError(
                f"max_context is {wanted:,}, but the model knows {config.max_positions:,} positions"
            )

        def windows(batch: int) -> int:
            sizes = [g.page_bytes(dtype) * g.pages_for(wanted, batch, step) for g in groups]
            return sum(n for n, g in zip(sizes, groups, strict=True) if g.window is not None)

        full = sum(g.page_bytes(dtype) for g in groups if g.window is None)
        batch = max_batch
        while batch > 1 and windows(batch) > budget // 2:
            batch -= 1
        pages = (budget - windows(batch)) // full
        least = -(-min(wanted, 2 * step) // PAGE)
        if pages < least:
            raise CabochonError(
                f"the key/value cache has {budget:,} bytes, but one sequence of {least * PAGE}"
                f" tokens needs {windows(1) + least * full:,}: raise kv_cache_bytes or lower"
                " prefill_chunk"
            )
        pages = min(pages, batch * -(-wanted // PAGE))
        each = tuple(
            pages if g.window is None else g.pages_for(wanted, batch, step) for g in groups
        )
        return cls(groups, each, batch, min(wanted, pages * PAGE), step)

    @classmethod
    def single(cls, config: TextConfig, length: int, step: int) -> CachePlan:
        """Just enough for one sequence of `length` tokens."""
        groups = cache_groups(config)
        return cls(groups, tuple(g.pages_for(length, 1, step) for g in groups), 1, length, step)

    def describe(self, dtype: torch.dtype, *, asked: int) -> str:
        """What fits, for people; `asked` is the batch that was wished for."""
        sizes = [g.page_bytes(dtype) * n for g, n in zip(self.groups, self.pages, strict=True)]
        return (
            f"keys and values take up to {sum(sizes) / 1e9:.2f} GB: {self.max_batch} of {asked}"
            f" requests at once, contexts of {self.max_context:,} tokens"
        )


class PageTable:
    """The pages of one sequence, a list for each group; entry `i` holds tokens `i * PAGE` on."""

    def __init__(self, groups: int) -> None:
        self.pages: tuple[list[int], ...] = tuple([] for _ in range(groups))
        self.names: list[Named] = []  # of the whole pages, from the first on
        self.settled: int | None = 0  # whole pages that others may begin with; None: none ever


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions `start` to `stop` of one sequence, to be computed in one step."""

    table: PageTable
    start: int
    stop: int
    pictures: Spans = ()  # those that lie in it, whole


class PagedCache:
    """The pools. Memory is reserved here, once; the system commits it when it is first written."""

    def __init__(self, plan: CachePlan, dtype: torch.dtype, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.store = store = Store()
        for index, (group, pages) in enumerate(zip(plan.groups, plan.pages, strict=True)):
            shape = (pages * PAGE, group.kv_heads, group.head_dim, dtype, device)
            for layer in group.layers:
                store.group_of[layer] = index
                store.keys[layer], store.values[layer] = Kept(*shape), Kept(*shape)
        self._pools = [PagePool(pages) for pages in plan.pages]

    def new_table(self) -> PageTable:
        return PageTable(len(self.plan.groups))

    def reserve(self, chunk: Chunk) -> bool:
        """Get the pages that `chunk` writes. False, and nothing taken, if too few are free."""
        missing = [-(-chunk.stop // PAGE) - len(pages) for pages in chunk.table.pages]
        if any(n > pool.free for n, pool in zip(missing, self._pools, strict=True)):
            return False
        for pages, pool, n in zip(chunk.table.pages, self._pools, missing, strict=True):
            pages.extend(pool.take() for _ in range(n))
        return True

    def adopt(self, table: PageTable, most: int, whole: Spans = ()) -> int:
        """Give an empty `table` the pages that hold its first tokens already, at most `most` pages.

        Returns for how many pages nothing need be computed: of the groups with a window those that
        the next query sees must be there, of the others all. They do not end inside of `whole`.
        """
        most = min(most, len(table.names))
        everywhere = [pool for pool, window in self._pools_and_windows() if window is None]
        known = 0
        while known < most and all(pool.has(table.names[known].name) for pool in everywhere):
            known += 1
        while known and not (
            self._sees_enough(table.names, known)
            and not any(first < known * PAGE < last for first, last in whole)
        ):
            known -= 1
        for pages, (pool, window) in zip(table.pages, self._pools_and_windows(), strict=True):
            first = _first_seen(known, window)
            pages.extend([_FREED] * first)
            for held in table.names[first:known]:
                pages.append(pool.page(held.name))
                pool.share(pages[-1])
        table.settled = known
        return known

    def borrow(self, table: PageTable, before: Name, tokens: Sequence[int]) -> int:
        """Copy what is known of the page behind `before`, the last of `table`'s whole pages.

        Returns of how many of `tokens` nothing need be computed: those that a page of every group
        begins with.
        """
        sources = [pool.alike(before, tokens) for pool in self._pools]
        count = min(known for _, known in sources)
        if not count:
            return 0
        for (source, _), pool in zip(sources, self._pools, strict=True):
            pool.share(source)  # or it might be the one that is taken
        enough = all(pool.free for pool in self._pools)
        for group, ((source, _), pool) in enumerate(zip(sources, self._pools, strict=True)):
            if enough:
                table.pages[group].append(pool.take())
                self._copy(group, source, table.pages[group][-1], count)
        for (source, _), pool in zip(sources, self._pools, strict=True):
            pool.drop(source)
        return count if enough else 0

    def _copy(self, group: int, source: int, target: int, count: int) -> None:
        for layer in self.plan.groups[group].layers:
            for kept in (self.store.keys[layer], self.store.values[layer]):
                kept.copy(source * PAGE, target * PAGE, count)

    def _sees_enough(self, names: Sequence[Named], known: int) -> bool:
        return all(
            pool.has(held.name)
            for pool, window in self._pools_and_windows()
            for held in names[_first_seen(known, window) : known]
        )

    def _pools_and_windows(self) -> Iterator[tuple[PagePool, int | None]]:
        for pool, group in zip(self._pools, self.plan.groups, strict=True):
            yield pool, group.window

    def forget(self, table: PageTable) -> None:
        """Let nobody else begin with the pages of `table`, now or later.

        Those that fell out of a window are not in it any more, but others would find them.
        """
        table.settled = None
        for pool in self._pools:
            for held in table.names:
                if pool.has(held.name):
                    pool.forget(pool.page(held.name))

    def release(self, table: PageTable, cut: Named | None = None) -> None:
        """Give the pages back; `cut` is what the one behind the whole pages holds."""
        if cut is not None and table.settled is not None:
            for pages, pool in zip(table.pages, self._pools, strict=True):
                pool.name(pages[table.settled], cut)
        for pages, pool in zip(table.pages, self._pools, strict=True):
            for page in reversed(pages):  # what others may begin with is given up last
                if page != _FREED:
                    pool.drop(page)
            pages.clear()
        table.settled = 0

    def free_pages(self) -> tuple[int, ...]:
        return tuple(pool.free for pool in self._pools)

    def settle(self, table: PageTable, computed: int) -> None:
        """Name the whole pages of the `computed` tokens, and drop those that no query will see."""
        whole = min(computed // PAGE, len(table.names))
        settled = whole if table.settled is None else table.settled
        for group, pages, pool in zip(self.plan.groups, table.pages, self._pools, strict=True):
            for i in range(settled, whole):
                pool.name(pages[i], table.names[i])
            if group.window is None:
                continue
            unseen = max(0, computed - group.window + 1) // PAGE
            for i in range(min(unseen, len(pages)) - 1, -1, -1):
                if pages[i] == _FREED:
                    break
                pool.drop(pages[i])
                pages[i] = _FREED
        if table.settled is not None:
            table.settled = max(settled, whole)


def slots_of(pages: Sequence[int], positions: Tensor) -> Tensor:
    """Where in the pool the tokens at `positions`, in a row, of a sequence with these pages lie."""
    first = int(positions[0]) // PAGE
    held = torch.tensor(pages[first : int(positions[-1]) // PAGE + 1], device=positions.device)
    return held[positions // PAGE - first] * PAGE + positions % PAGE


def _first_seen(pages: int, window: int | None) -> int:
    """The first page that the query behind `pages` whole ones sees."""
    return 0 if window is None else max(0, pages * PAGE - window + 1) // PAGE


@dataclass(frozen=True, slots=True)
class _Reading:
    """What the queries of one chunk look at in one group."""

    slots: Tensor  # [keys], places in the pool
    mask: Tensor | None  # [queries, keys]


class CacheStep:
    """One step's view of the cache, the `KeyValues` that the model sees.

    Rows of the step are the chunks' positions, one chunk after the other. After `narrow`, chunks
    have fewer queries than positions, and those without any are left out.
    """

    def __init__(self, cache: PagedCache, chunks: Sequence[Chunk]) -> None:
        self.cache = cache
        self.chunks = chunks
        # Positions that ask, of each chunk.
        self._asking: Sequence[Sequence[int]] = [range(c.start, c.stop) for c in chunks]
        self._narrowed = False
        self._writes: dict[int, Tensor] = {}
        self._readings: dict[int, list[_Reading]] = {}
        self._accesses: list[Access] = []

    @property
    def store(self) -> Store:
        return self.cache.store

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        group = self.store.group_of[layer]
        if group not in self._writes:
            self._writes[group] = self._write_slots(group)
        for pool, made in ((self.store.keys, keys), (self.store.values, values)):
            pool[layer].write(self._writes[group], made)

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        group = self.store.group_of[layer]
        if group not in self._readings:
            self._readings[group] = [self._reading(group, i) for i in range(len(self.chunks))]
        out = torch.empty_like(queries)
        row = 0
        for reading, asking in zip(self._readings[group], self._asking, strict=True):
            rows = slice(row, row := row + len(asking))
            keys = self.store.keys[layer].read(reading.slots, queries.dtype)
            values = self.store.values[layer].read(reading.slots, queries.dtype)
            out[rows] = attention(queries[rows], keys, values, reading.mask)
        return out

    def accesses(self) -> Sequence[Access]:
        if not self._accesses:
            self._accesses = [self._access(group) for group in range(len(self.cache.plan.groups))]
        return self._accesses

    def _access(self, group: int) -> Access:
        layout = self.cache.plan.groups[group]
        slots, pages, page_at = array("q"), array("i"), array("i")
        low, high = array("i"), array("i")
        for chunk, asking in zip(self.chunks, self._asking, strict=True):
            held, first = chunk.table.pages[group], len(pages)
            pages.extend(held)
            for position in asking:
                page_at.append(first)
                sees = seen(position, layout.window, layout.pictures, chunk.pictures)
                low.append(sees[0])
                high.append(sees[1])
                if not self._narrowed:
                    slots.append(held[position // PAGE] * PAGE + position % PAGE)
        return Access(slots, pages, page_at, low, high)

    def narrow(self, rows: Sequence[int]) -> CacheStep:
        asking: list[list[int]] = []
        first = 0
        for chunk in self.chunks:
            stop = first + chunk.stop - chunk.start
            inside = rows[bisect_left(rows, first) : bisect_left(rows, stop)]
            asking.append([chunk.start + row - first for row in inside])
            first = stop
        asked = [i for i, positions in enumerate(asking) if positions]
        step = CacheStep(self.cache, [self.chunks[i] for i in asked])
        step._asking, step._narrowed = [asking[i] for i in asked], True
        return step

    def _write_slots(self, group: int) -> Tensor:
        return torch.cat([self._slots(group, chunk, chunk.start) for chunk in self.chunks])

    def _slots(self, group: int, chunk: Chunk, first: int) -> Tensor:
        """Where positions from `first` to the end of `chunk` lie."""
        span = torch.arange(first, chunk.stop, device=self.cache.device)
        return slots_of(chunk.table.pages[group], span)

    def _reading(self, group: int, index: int) -> _Reading:
        chunk, asking = self.chunks[index], self._asking[index]
        layout = self.cache.plan.groups[group]
        window = layout.window
        first = 0 if window is None else max(0, asking[0] - window + 1)
        slots = self._slots(group, chunk, first)
        if len(asking) == 1 and asking[0] == chunk.stop - 1:  # sees all that is read
            return _Reading(slots, None)
        span = torch.arange(first, chunk.stop, device=self.cache.device)
        mask = visible(asking, span, window, layout.pictures, chunk.pictures)
        return _Reading(slots, mask)
