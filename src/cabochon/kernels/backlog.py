"""`Backlog`: what compiled code does while Python does something else."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cabochon.kernels.library import Library, Matrix, Sketch, Stored, Stretch, threads

if TYPE_CHECKING:
    from torch import Tensor

_PATIENCE = 100  # milliseconds before Python may say that somebody pressed a key
_PENDING = 512 << 20  # bytes that tasks will read, and that are kept for them


class _Kept(NamedTuple):
    number: int  # of the task
    read: int  # bytes, that are let go when it is done
    tensors: tuple[Tensor, ...]


class Backlog:
    """Tasks are done in the order in which they came, piece by piece, by threads of its own.

    Whoever waits for a task works as well. When the block of a `with` ends, what has not begun is
    forgotten.

    Args:
        threads: that work, among them one that waits.
    """

    def __init__(self, library: Library, threads: int) -> None:
        self._library = library
        self._handle = library.backlog(threads - 1)
        self._kept: deque[_Kept] = deque()
        self._pending = 0  # bytes of what is kept
        self._written: dict[int, tuple[object, ...]] = {}
        self._files: dict[Path, int] = {}
        self.when_waiting: Callable[[], object] | None = None  # Python has nothing else to do

    def file(self, path: Path) -> int:
        """Its descriptor, for as long as there are tasks."""
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def look(self, stretch: Stretch, *kept: object) -> int:
        """See what is in bytes of a file; `kept` is where that is written.

        The number is what `wait` takes.
        """
        number: int = self._library.look(self._handle, stretch)
        self._written[number] = kept
        return number

    def pack(self, matrix: Matrix, stored: Stored, to: Tensor, *parts: Tensor) -> None:
        """Fill `matrix`, whose room is `to`, with what is `stored` in `parts`."""
        self._keep(self._library.pack(self._handle, matrix, stored), (to,), parts)

    def sketch(self, sketch: Sketch, to: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> None:
        """Fill `sketch`, whose room is `to`, with one of what is stored in `parts`."""
        self._keep(self._library.sketch(self._handle, sketch), to, parts)

    def copy(self, to: Tensor, stored: Tensor) -> None:
        address, nbytes = stored.data_ptr(), stored.nbytes
        number = self._library.copy(self._handle, to.data_ptr(), address, nbytes)
        self._keep(number, (to,), (stored,))

    def wait(self, number: int) -> None:
        if self.when_waiting is not None and not self._library.wait(self._handle, number, 0):
            self.when_waiting()
        while not self._library.wait(self._handle, number, _PATIENCE):
            pass
        self._written.pop(number, None)

    def finish(self) -> None:
        """Wait until all is done that fills memory."""
        self._settle(0)

    def _keep(self, number: int, to: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> None:
        """Let memory that a task writes to and reads live until it is done."""
        kept = _Kept(number, sum(part.nbytes for part in parts), (*to, *parts))
        self._kept.append(kept)
        self._pending += kept.read
        self._settle(_PENDING)

    def _settle(self, most: int) -> None:
        """Let go of what is done with, until no more than `most` bytes are read."""
        while self._kept:
            first = self._kept[0]
            done = self._library.wait(self._handle, first.number, 0)
            if not done and most and self._pending <= most:
                return
            self.wait(first.number)
            self._kept.popleft()
            self._pending -= first.read

    def __enter__(self) -> Backlog:
        return self

    def __exit__(self, *_: object) -> None:
        self._library.end(self._handle)
        self._kept.clear()
        self._written.clear()
        for file in self._files.values():
            os.close(file)


@contextmanager
def at_once(library: Library, backlog: Backlog | None) -> Iterator[Backlog]:
    """`backlog`; without it, one whose work is done when the block ends."""
    if backlog is not None:
        yield backlog
        return
    with Backlog(library, threads()) as own:
        yield own
        own.finish()
