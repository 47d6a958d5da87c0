"""The pages of one group of layers: who holds them, and which prefixes they hold.

A page whose tokens are all computed has a name: a hash over everything that went into it, from the
first token on. It can be shared by sequences that begin alike. When nobody holds it any more it
stays as it is, idle, until its place is needed; the one left longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict

Name = bytes


class PagePool:
    def __init__(self, pages: int) -> None:
        self._blank = list(range(pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # named, held by nobody, oldest first
        self._holders = [0] * pages
        self._names: dict[int, Name] = {}
        self._pages: dict[Name, int] = {}

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
            del self._pages[self._names.pop(page)]
        self._holders[page] = 1
        return page

    def has(self, name: Name) -> bool:
        return name in self._pages

    def share(self, name: Name) -> int:
        """The page of that name, for one more holder; it must be there."""
        page = self._pages[name]
        self._holders[page] += 1
        self._idle.pop(page, None)
        return page

    def name(self, page: int, name: Name) -> None:
        """Say what a page holds. Of two that hold the same, one is enough."""
        if page not in self._names and name not in self._pages:
            self._names[page] = name
            self._pages[name] = page

    def forget(self, page: int) -> None:
        """Nobody else gets a page that somebody holds, whatever is in it."""
        name = self._names.pop(page, None)
        if name is not None:
            del self._pages[name]

    def drop(self, page: int) -> None:
        """One holder less."""
        self._holders[page] -= 1
        if self._holders[page]:
            return
        if page in self._names:
            self._idle[page] = None
        else:
            self._blank.append(page)
