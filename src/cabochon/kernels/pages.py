"""Large pages for weights that are loaded; csrc/pages.cpp says why not sooner."""

from __future__ import annotations

from threading import Thread
from time import sleep
from weakref import ref

from torch import Tensor, nn

from cabochon.kernels.floats import FloatsWeight
from cabochon.kernels.library import Library
from cabochon.kernels.packed import PackedWeight
from cabochon.kernels.sketch import SketchedHead

_PATIENCE = 2.0  # seconds


def enlarge(model: nn.Module, library: Library | None) -> None:
    """Move what the kernels multiply with into large pages, in a thread, while `model` is used.

    Not at once: meanwhile the system gives no other pages, and somebody waits for a first token.
    """
    if library is not None:
        Thread(target=_later, args=(ref(model), library), name="large pages", daemon=True).start()


def _later(model: ref[nn.Module], library: Library) -> None:
    sleep(_PATIENCE)
    for place in _rooms(model()):
        room = place()
        if room is not None:
            library.enlarge(room.data_ptr(), room.nbytes)


def _rooms(model: nn.Module | None) -> list[ref[Tensor]]:
    """What is to be moved; a model that is let go meanwhile shall not be kept by this."""
    weights = [
        module
        for module in (model.modules() if model is not None else ())
        if isinstance(module, PackedWeight | FloatsWeight)
        and not isinstance(module, SketchedHead)  # its floats stay in their file
    ]
    return [ref(buffer) for weight in weights for buffer in weight.buffers()]
