"""`Arena`: memory for weights, side by side, so that large pages can hold all of it."""

from __future__ import annotations

from threading import Thread
from time import sleep
from weakref import ref

import torch
from torch import Tensor

from cabochon.kernels.library import Library

ALIGNMENT = 64  # of what is handed out
_PIECE = 64 << 20  # bytes got from the system at once, which gives none before they are written
_LARGE = 2 << 20  # a large page
_PATIENCE = 2.0  # seconds
_REST = 3  # times as long as a page took


class Arena:
    """Hands out memory that lives for as long as somebody holds a tensor in it, or the arena.

    A matrix by itself begins and ends within large pages, which then are small ones: of E2B's
    layers every third byte lay in those.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._pieces: list[Tensor] = []  # whole large pages
        self._used = 0  # of the last

    def take(self, nbytes: int) -> Tensor:
        """uint8 `[nbytes]`, whatever it holds; its address is a multiple of `ALIGNMENT`.

        What kernels fetch ahead, behind its end, need not exist.
        """
        if not self._pieces or self._used + nbytes > len(self._pieces[-1]):
            self._pieces.append(self._piece(nbytes))
            self._used = 0
        taken = self._pieces[-1][self._used : self._used + nbytes]
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return taken

    def _piece(self, nbytes: int) -> Tensor:
        size = -(-max(nbytes, _PIECE) // _LARGE) * _LARGE
        room = torch.empty(size + _LARGE, dtype=torch.uint8)
        skip = -room.data_ptr() % _LARGE
        piece = room[skip : skip + size]
        self._library.advise(piece.data_ptr(), size)
        return piece

    def enlarge(self) -> Thread:
        """Move everything into large pages, in a thread, while it is used; csrc/pages.cpp says why.

        Not at once: meanwhile the system gives no other pages, and somebody waits for a first
        token.
        """
        pieces = [(ref(piece), len(piece)) for piece in self._pieces[:-1]]
        if self._pieces:
            pieces.append((ref(self._pieces[-1]), -(-self._used // _LARGE) * _LARGE))
        work = (self._library, pieces)
        thread = Thread(target=_enlarge, args=work, name="large pages", daemon=True)
        thread.start()
        return thread


def _enlarge(library: Library, pieces: list[tuple[ref[Tensor], int]]) -> None:
    sleep(_PATIENCE)
    for place, size in pieces:
        piece = place()
        if piece is not None:
            library.enlarge(piece.data_ptr(), size, _REST)
