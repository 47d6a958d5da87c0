"""Large pages for weights that are loaded; csrc/pages.cpp says why not sooner."""

from __future__ import annotations

from threading import Thread

from torch import nn

from cabochon.kernels.floats import FloatsWeight
from cabochon.kernels.library import Library
from cabochon.kernels.packed import PackedWeight
from cabochon.kernels.sketch import SketchedHead


def enlarge(model: nn.Module, library: Library | None) -> None:
    """Move what the kernels multiply with into large pages, in a thread, while `model` is used."""
    if library is None:
        return
    weights = [
        module
        for module in model.modules()
        if isinstance(module, PackedWeight | FloatsWeight)
        and not isinstance(module, SketchedHead)  # its floats stay in their file
    ]
    rooms = [buffer for weight in weights for buffer in weight.buffers()]

    def work() -> None:
        for room in rooms:
            library.enlarge(room.data_ptr(), room.nbytes)

    Thread(target=work, name="large pages", daemon=True).start()
