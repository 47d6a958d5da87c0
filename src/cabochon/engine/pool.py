"""The pages of one group of layers: who holds them, and which prefixes they hold.

A page whose tokens are computed has a name: a hash over everything that went into it, from the
first token on. It can be shared by sequences that begin alike; its first tokens can be copied by
those that go on otherwise within it. When nobody holds it any more it stays as it is, idle, until
its place is needed; the one left longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

Name = bytes


class Named(NamedTuple):
    """What a page holds."""

    name: Name
    before: Name  # of the page before; of the first, that of whoever asks
    tokens: tuple[int, ...]  # fewer than a page if it is cut; none if media reach into it


class PagePool:
    def __init__(self, pages: int) -> None:
        self._blank = list(range(pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # named, held by nobody, oldest first
        self._holders = [0] * pages
        self._held: dict[int, Named] = {}
        self._pages: dict[Name, int] = {}
        self._behind: defaultdict[Name, set[int]] = defaultdict(set)  # pages by what is before them

    @property
    def free(self) -> int:
        """Pages that `take` can give."""
        return len(self._blank) + len(self._idle)

    def take(self) -> int:
        """A page to write into, for one holder."""
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self.forget(page)
        self._holders[page] = 1
        return page

    def has(self, name: Name) -> bool:
        return name in self._pages

    def share(self, page: int) -> None:
        """One holder more."""
        self._holders[page] += 1
        self._idle.pop(page, None)

    def page(self, name: Name) -> int:
        """The page of that name, which must be there."""
        return self._pages[name]

    def name(self, page: int, held: Named) -> None:
        """Say what a page holds. Of two that hold the same, one is enough."""
        if page not in self._held and held.name not in self._pages:
            self._held[page] = held
            self._pages[held.name] = page
            self._behind[held.before].add(page)

    def alike(self, before: Name, tokens: Sequence[int]) -> tuple[int, int]:
        """The page behind `before` that begins most like `tokens`, and in how many of them."""
        shared = {
            page: _in_common(self._held[page].tokens, tokens)
            for page in self._behind.get(before, ())
        }
        best = max(shared, key=lambda page: shared[page], default=-1)
        return best, shared.get(best, 0)

    def forget(self, page: int) -> None:
        """Nobody gets the page for what was in it."""
        held = self._held.pop(page, None)
        if held is not None:
            del self._pages[held.name]
            self._behind[held.before].discard(page)
            if not self._behind[held.before]:
                del self._behind[held.before]
        if page in self._idle:
            del self._idle[page]
            self._blank.append(page)

    def drop(self, page: int) -> None:
        """One holder less."""
        self._holders[page] -= 1
        if self._holders[page]:
            return
        if page in self._held:
            self._idle[page] = None
        else:
            self._blank.append(page)


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens they begin alike with."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
