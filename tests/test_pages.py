"""Weights move into large pages while they are multiplied with, and stay what they are."""

from __future__ import annotations

import mmap
import platform
import re
import time
from pathlib import Path

import pytest
import torch

from cabochon.kernels.arena import Arena
from cabochon.kernels.choose import Kernels
from cabochon.kernels.library import library
from cabochon.kernels.packed import PackedWeight
from cabochon.nn.gguf_blocks import BlockWeight

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LINUX = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
LARGE = 2 << 20


def large_bytes(tensor: torch.Tensor) -> int:
    """Of the mapping in which `tensor` lies, how much is in large pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= tensor.data_ptr() < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0


KERNELS = library()
built = pytest.mark.skipif(KERNELS is None, reason="there was no C++ compiler at installation")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@built
def test_what_is_taken_lies_side_by_side_and_apart() -> None:
    assert KERNELS is not None
    arena, sizes = Arena(KERNELS), [1, 100, 5 << 20, 0, 70 << 20, 64, 40 << 20, 1000]
    taken = [arena.take(size) for size in sizes]
    places = sorted((part.data_ptr(), part.nbytes) for part in taken if part.nbytes)
    assert [part.nbytes for part in taken] == sizes
    assert all(place % 64 == 0 for place, _ in places)
    ends = [place + size for place, size in places]
    assert all(end <= place for end, (place, _) in zip(ends, places[1:], strict=False))
    small = [part.data_ptr() for part in taken if 0 < part.nbytes < 10 << 20]
    assert max(small) - min(small) < 6 << 20, "large ones between them do not part them"


@built
@pytest.mark.skipif(platform.system() != "Linux", reason="memory is counted in /proc")
def test_memory_goes_back_when_nothing_is_left_in_it() -> None:
    assert KERNELS is not None
    arena, before = Arena(KERNELS), resident()
    for _ in range(3):
        taken = arena.take(100 << 20).fill_(1)
        part = taken[5:6]
        del taken
        assert resident() > before + (90 << 20)
        assert part.item() == 1
        del part
        assert resident() < before + (40 << 20)


@built
@pytest.mark.skipif(
    platform.system() != "Linux" or LINUX < (6, 1), reason="this system makes no large pages later"
)
@pytest.mark.skipif(
    not ENABLED.is_file() or "[never]" in ENABLED.read_text(), reason="large pages are turned off"
)
def test_weights_move_into_large_pages_and_stay_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (8192, 2048 // 32 * 18), dtype=torch.uint8, generator=generator)
    blocks[:, 1::18] &= 0x3F  # scales are finite
    kernels = Kernels(KERNELS, "int8")
    packed = kernels.for_weight(BlockWeight(blocks, "Q4_0", in_features=2048))
    assert isinstance(packed, PackedWeight)
    x = torch.randn(2, 2048, generator=generator)
    before, dense = packed.linear(x), packed.dense(torch.float32)
    kernels.enlarge()
    del kernels  # a drafter's are let go; the thread needs nothing of them
    end = time.monotonic() + 30
    while large_bytes(packed.data) < packed.data.nbytes and time.monotonic() < end:
        assert torch.equal(packed.linear(x), before)
    assert large_bytes(packed.data) >= packed.data.nbytes
    assert torch.equal(packed.linear(x), before)
    assert torch.equal(packed.dense(torch.float32), dense)
