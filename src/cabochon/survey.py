"""What compiled code sees of a plan's tensors: it reads them while Python does something else.

No torch: it may be on its way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cabochon.checkpoint.folder import cannot_be_read, cut_off
from cabochon.checkpoint.gguf import BLOCKS
from cabochon.checkpoint.headers import BITS, TensorMeta
from cabochon.kernels.backlog import Backlog
from cabochon.kernels.library import library, threads_without_torch
from cabochon.kernels.look import Looking
from cabochon.load.looked import Looked, every_of, kind_of, kind_of_parameter
from cabochon.load.plan import LoadPlan

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def surveyed(plan: LoadPlan, threads: int | None) -> Iterator[Survey | None]:
    """A survey of `plan` that goes on while the block runs; none without compiled code.

    `threads` are those that will compute; None: those that torch takes.
    """
    compiled = library()
    if compiled is None:
        yield None
        return
    with Backlog(compiled, threads or threads_without_torch()) as backlog:
        yield Survey(plan, backlog)


class Survey:
    """Begins at once, in the order of the files. A call waits for what is in one tensor, once.

    Raises:
        UnreadableError: a file cannot be opened.
    """

    def __init__(self, plan: LoadPlan, backlog: Backlog) -> None:
        self.backlog = backlog
        wanted = sorted(_wanted(plan), key=lambda tensor: _place(tensor[0]))
        self._begun = {_place(meta): self._begin(meta, kind) for meta, kind in wanted}

    def _begin(self, meta: TensorMeta, kind: str) -> Looking:
        blocks = kind in BLOCKS
        unit = BLOCKS[kind][1] if blocks else BITS.get(kind, 8) // 8
        every = every_of(meta) if blocks else 0
        try:
            return Looking(self.backlog, meta.file, meta.span, kind, unit, every)
        except OSError as error:
            raise cannot_be_read(meta, error) from None

    def __call__(self, tensor: Tensor, meta: TensorMeta, kind: str) -> Looked:
        """What is in the tensor that `meta` describes.

        Raises:
            UnreadableError: its file ends early, or cannot be read.
        """
        looking = self._begun.pop(_place(meta))  # of fifty thousand tensors, memory counts
        try:
            found = looking.found()
        except EOFError:
            raise cut_off(meta, meta.file.stat().st_size) from None
        except OSError as error:
            raise cannot_be_read(meta, error) from None
        sample = None
        if kind in BLOCKS and not found.damaged:
            sample = _magnitudes(looking.sample(), kind)
        digest = hashlib.sha256(found.hashed).digest()
        return Looked(digest, found.numbers, found.zeros, found.largest, found.damaged, sample)


def _place(meta: TensorMeta) -> tuple[str, int, int]:
    """Of a tensor, or of some of its rows, which go by the same name."""
    return (str(meta.file), *meta.span)


def _magnitudes(blocks: bytearray, kind: str) -> Tensor:
    import torch

    from cabochon.nn.gguf_blocks import magnitudes

    return magnitudes(torch.frombuffer(blocks, dtype=torch.uint8).view(-1, BLOCKS[kind][1]), kind)


def _wanted(plan: LoadPlan) -> Iterator[tuple[TensorMeta, str]]:
    """All tensors that become part of a model, and what is looked at in them."""
    for read in plan.sites:
        for slot in read.slots:
            if slot.leaf in read.stored:
                meta = read.stored[slot.leaf]
                yield meta, kind_of(slot, meta)
    for parameter in plan.parameters:
        yield parameter.tensor, kind_of_parameter(parameter.tensor)
