"""Tensors where they lie in their files: mapped into memory, and not copied.

Pages that are looked at count as memory of this process until their tensor is let go; pages of a
table of which a few rows are looked up are never more than those.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from cabochon.checkpoint.folder import TORCH_NAMES, cut_off, read_tensor
from cabochon.checkpoint.gguf import BLOCKS
from cabochon.checkpoint.headers import BITS, TensorMeta
from cabochon.errors import UnreadableError

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1 << 14  # bytes that are read faster than mapped
PIECE = 32 << 20  # bytes that are in memory together while all of a tensor is looked at
SHARED = 8 << 20  # bytes whose pages threads have at hand sooner than one of them

_POPULATE_READ = 22  # of Linux 5.14, for madvise


def map_tensor(meta: TensorMeta) -> Tensor:
    """The tensor that `meta` describes, as `read_tensor` gives it, in its file's own memory.

    It must not be written to. A small one is read, and so is one that cannot be mapped, for its
    place in the file or for the file system's sake. A process that looks at what cannot be read
    is killed by the system: look at `pieces` first, or have it looked at.

    Raises:
        UnreadableError: the file ends early, or cannot be read.
    """
    import torch

    if meta.dtype in BLOCKS:
        octets = replace(meta, dtype="U8", shape=(meta.nbytes,))
        return map_tensor(octets).view(*meta.shape[:-1], -1)
    size = BITS[meta.dtype] // 8
    if meta.nbytes < SMALL or meta.span[0] % size:
        return read_tensor(meta)
    skip = meta.span[0] % mmap.ALLOCATIONGRANULARITY
    area = _area(meta, skip)
    if area is None:
        return read_tensor(meta)
    dtype = getattr(torch, TORCH_NAMES[meta.dtype])
    flat = torch.frombuffer(area, dtype=dtype, count=meta.nbytes // size, offset=skip)
    return flat.view(meta.shape)


def _area(meta: TensorMeta, skip: int) -> mmap.mmap | None:
    try:
        with meta.file.open("rb", buffering=0) as file:
            here = os.fstat(file.fileno()).st_size
            if here < meta.span[1]:
                raise cut_off(meta, here)
            # A copy on writing: what should write to it after all would not change the file.
            return mmap.mmap(
                file.fileno(),
                skip + meta.nbytes,
                access=mmap.ACCESS_COPY,
                offset=meta.span[0] - skip,
            )
    except OSError:  # of file systems that cannot; reading says what is wrong, if anything is
        return None


_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _populate(tensor: Tensor, meta: TensorMeta) -> Tensor:
    """Have all pages there at once. Many are shared among threads; others run meanwhile."""
    import torch

    skip = tensor.data_ptr() % mmap.PAGESIZE
    address, length = tensor.data_ptr() - skip, tensor.nbytes + skip
    threads = torch.get_num_threads() if length >= SHARED else 1
    step = -(-length // threads // mmap.PAGESIZE) * mmap.PAGESIZE
    shares = [(address + at, min(step, length - at)) for at in range(0, length, step)]
    if len(shares) == 1:
        errors = [_asked(shares[0])]
    else:
        with ThreadPoolExecutor(threads) as pool:
            errors = list(pool.map(_asked, shares))
    if not {_EFAULT, _EIO}.isdisjoint(errors):
        raise UnreadableError(
            f"{meta.file}: tensor {meta.name!r}: {os.strerror(_EIO)}; the file ends early, or what"
            " it lies on fails"
        )
    return tensor


def _asked(share: tuple[int, int]) -> int:
    """The number of the error with which pages could not be had; 0: none."""
    return ctypes.get_errno() if _libc.madvise(*share, _POPULATE_READ) else 0


_EIO, _EFAULT = 5, 14


def pieces(tensor: Tensor, meta: TensorMeta) -> Iterator[Tensor]:
    """All of `tensor`, which `meta` describes: itself, or flat pieces of it if it is large.

    A piece is a multiple of 64 KiB, and of whole blocks of ggml. They are mapped one at a time, so
    that none needs to stay in memory.

    Raises:
        UnreadableError: a piece cannot be read.
    """
    if meta.nbytes <= PIECE:
        yield _populate(tensor, meta)
        return
    dtype = "U8" if meta.dtype in BLOCKS else meta.dtype
    unit = math.lcm(1 << 16, BLOCKS.get(meta.dtype, (1, 1))[1])
    step, size = max(1, PIECE // unit) * unit, BITS[dtype] // 8
    for start in range(0, meta.nbytes, step):
        stop = min(start + step, meta.nbytes)
        span = (meta.span[0] + start, meta.span[0] + stop)
        part = replace(meta, dtype=dtype, shape=((stop - start) // size,), span=span)
        yield _populate(map_tensor(part), part)
