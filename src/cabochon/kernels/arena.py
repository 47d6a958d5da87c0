"""`Arena`: memory for weights, side by side, so that large pages can hold all of it."""

from __future__ import annotations

import mmap
import sys
import threading
from threading import Thread
from time import sleep
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from cabochon.kernels.library import Library

ALIGNMENT = 64  # of what is handed out
_PIECE = 64 << 20  # bytes got from the system at once, which gives none before they are written
_LARGE = 2 << 20  # a large page
_PATIENCE = 2.0  # seconds
_REST = 3  # times as long as a page took


class _Piece(NamedTuple):
    memory: ref[mmap.mmap]  # kept by the tensors in it
    address: int  # of the first large page
    size: int  # of all of them


class Arena:
    """Hands out memory that goes back to the system when no tensor is left in a piece of it.

    A matrix by itself begins and ends within large pages, which then are small ones: of E2B's
    layers every third byte lay in those.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._pieces: list[_Piece] = []
        self._rest = torch.empty(0, dtype=torch.uint8)  # of the piece that is being cut up

    def take(self, nbytes: int) -> Tensor:
        """uint8 `[nbytes]`, whatever it holds; its address is a multiple of `ALIGNMENT`.

        What kernels fetch ahead, behind its end, need not exist.

        Raises:
            MemoryError: the system has no more.
        """
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if size > _PIECE // 2:
            return self._piece(size)[:nbytes]
        if size > len(self._rest):
            self._rest = self._piece(_PIECE)
        taken, self._rest = self._rest[:nbytes], self._rest[size:]
        return taken

    def _piece(self, nbytes: int) -> Tensor:
        size = -(-nbytes // _LARGE) * _LARGE
        memory = _memory(size + _LARGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        skip = -whole.data_ptr() % _LARGE
        piece = whole[skip : skip + size]
        self._pieces.append(_Piece(ref(memory), piece.data_ptr(), size))
        self._library.advise(piece.data_ptr(), size)
        return piece

    def enlarge(self) -> None:
        """Move everything into large pages, in a thread, while it is used; csrc/pages.cpp says why.

        Not at once: meanwhile the system gives no other pages, and somebody waits for a first
        token.
        """
        _Enlarging(self._library, list(self._pieces)).start()


class _Enlarging(Thread):
    def __init__(self, library: Library, pieces: list[_Piece]) -> None:
        super().__init__(name="large pages", daemon=True)
        self._library = library
        self._pieces = pieces

    def run(self) -> None:
        sleep(_PATIENCE)
        for memory, address, size in self._pieces:
            for at in range(address, address + size, _PIECE):
                kept = memory()  # not for long: whoever lets go of a model wants its memory back
                if kept is not None:
                    self._library.enlarge(at, min(_PIECE, address + size - at), _REST)
                del kept


def settled() -> None:
    """Wait until nothing is moved any more: for who measures how fast it is then."""
    for thread in threading.enumerate():
        if isinstance(thread, _Enlarging):
            thread.join()


def _memory(size: int) -> mmap.mmap:
    try:
        if sys.platform == "win32":
            return mmap.mmap(-1, size)
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(str(error)) from None
