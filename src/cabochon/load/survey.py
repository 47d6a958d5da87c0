"""What compiled code sees of a plan's tensors: it reads them while Python does something else.

No torch: it may be on its way.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from cabochon.checkpoint.folder import cannot_be_read, cut_off
from cabochon.checkpoint.gguf import BLOCKS
from cabochon.checkpoint.headers import BITS, TensorMeta
from cabochon.errors import UnreadableError
from cabochon.kernels import library
from cabochon.kernels.backlog import Backlog
from cabochon.kernels.library import Stretch
from cabochon.kernels.look import found_of, numbers_of
from cabochon.load.looked import Looked, every_of, kind_of
from cabochon.load.plan import LoadPlan
from cabochon.nn.found import HASHED, NOTHING

if TYPE_CHECKING:
    from torch import Tensor


class _Begun(NamedTuple):
    """A tensor that is looked at, and where what is seen is written."""

    number: int  # of the task
    kind: str
    sums: ctypes.Array[ctypes.c_char]
    sample: ctypes.Array[ctypes.c_char] | None
    found: library.Found


class Survey:
    """Begins at once, in the order of the files. A call waits for what is in one tensor.

    It must live until `backlog` has ended, which writes to it.

    Raises:
        UnreadableError: a file cannot be opened.
    """

    def __init__(self, plan: LoadPlan, backlog: Backlog) -> None:
        self._backlog = backlog
        wanted = sorted(_wanted(plan), key=lambda tensor: (str(tensor[0].file), tensor[0].span))
        self._begun = {meta.name: self._begin(meta, kind) for meta, kind in wanted}

    def __call__(self, tensor: Tensor, meta: TensorMeta, kind: str) -> Looked:
        """What is in the tensor that `meta` describes.

        Raises:
            UnreadableError: its file ends early, or cannot be read.
        """
        begun = self._begun[meta.name]
        assert begun.kind == kind
        self._backlog.wait(begun.number)
        if begun.found.error:
            raise self._unreadable(meta, begun.found.error)
        found = found_of(kind, begun.sums.raw, begun.found)
        digest = hashlib.sha256(found.hashed).digest()
        sample = _magnitudes(begun) if begun.sample is not None and not found.damaged else None
        return Looked(digest, found.numbers, found.zeros, found.largest, found.damaged, sample)

    def _begin(self, meta: TensorMeta, kind: str) -> _Begun:
        try:
            file = self._backlog.file(meta.file)
        except OSError as error:
            raise cannot_be_read(meta, error.errno or 0) from None
        size = BLOCKS[kind][1] if kind in BLOCKS else BITS.get(kind, 8) // 8
        every = every_of(meta) if kind in BLOCKS else 0
        whole, rest = divmod(meta.nbytes, HASHED)
        sums = ctypes.create_string_buffer(whole * 8 + rest)
        count = -(-meta.nbytes // (size * every)) if every else 0
        sample = ctypes.create_string_buffer(count * size) if count else None
        found = library.Found()
        stretch = Stretch(
            file=file,
            at=meta.span[0],
            size=meta.nbytes,
            every=every if count else 0,
            numbers=numbers_of(kind, size),
            sums=ctypes.addressof(sums),
            sample=None if sample is None else ctypes.addressof(sample),
            found=ctypes.pointer(found),
        )
        return _Begun(self._backlog.look(stretch), kind, sums, sample, found)

    def _unreadable(self, meta: TensorMeta, error: int) -> UnreadableError:
        if error < 0:
            return cut_off(meta, meta.file.stat().st_size)
        return cannot_be_read(meta, error)


def _magnitudes(begun: _Begun) -> Tensor:
    import torch

    from cabochon.nn.gguf_blocks import magnitudes

    blocks = torch.frombuffer(begun.sample, dtype=torch.uint8)
    return magnitudes(blocks.view(-1, BLOCKS[begun.kind][1]), begun.kind)


def _wanted(plan: LoadPlan) -> Iterator[tuple[TensorMeta, str]]:
    """All tensors that become part of a model, and what is looked at in them."""
    for read in plan.sites:
        for slot in read.slots:
            if slot.leaf in read.stored:
                meta = read.stored[slot.leaf]
                yield meta, kind_of(slot, meta)
    for parameter in plan.parameters:
        yield parameter.tensor, NOTHING
