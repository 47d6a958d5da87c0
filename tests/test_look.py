"""What a load sees of stored bytes: compiled code and numpy find the same, and what torch finds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import pytest
import torch
from torch import Tensor

from cabochon.kernels.backlog import Backlog
from cabochon.kernels.library import library
from cabochon.kernels.look import Looking
from cabochon.nn.found import HASHED, NOTHING, POWERS, Found
from cabochon.nn.gguf_blocks import KINDS, magnitudes
from cabochon.nn.look import FLOATS, plainly

COMPILED = library()
Look = Callable[[Tensor, str], Found]


def unit_of(kind: str) -> int:
    return KINDS[kind].layout.nbytes if kind in KINDS else WIDTHS[kind]


def compiled(octets: Tensor, kind: str) -> Found:
    """By compiled code, somewhere in a file."""
    assert COMPILED is not None
    before = 4321
    with NamedTemporaryFile() as file, Backlog(COMPILED, 2) as backlog:
        file.write(bytes(before) + bytes(octets.numpy()) + bytes(99))
        file.flush()
        span = (before, before + len(octets))
        return Looking(backlog, Path(file.name), span, kind, unit_of(kind)).found()


LOOKS = [plainly, pytest.param(compiled, marks=pytest.mark.skipif(
    COMPILED is None, reason="there was no C++ compiler when cabochon was installed"
))]  # fmt: skip
both = pytest.mark.parametrize("look", LOOKS, ids=["numpy", "compiled"])

# Bytes: none, few, whole sums of the hash, and more than a thread takes with some left over.
SIZES = [0, 4, HASHED, 5 * HASHED, 9 * HASHED + 1000]
WIDTHS = {kind: dtype.itemsize for kind, dtype in FLOATS.items()} | {POWERS: 1, NOTHING: 1}


def octets_of(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def blocks_of(kind: str, count: int) -> Tensor:
    """Random blocks of which no scale is other than finite, `[count, bytes]`."""
    blocks = octets_of(count * KINDS[kind].layout.nbytes).view(count, -1)
    if KINDS[kind].levels is not None:
        blocks[:, :4] &= 0x7E
        return blocks
    for place in offsets_of(kind):
        blocks[:, place + 1] &= 0xBF  # an exponent below the middle, of either sign
    return blocks


def offsets_of(kind: str) -> list[int]:
    """Where the float16s of a block lie: found by what changing a byte changes."""
    size = KINDS[kind].layout.nbytes
    usual = torch.zeros(1, size, dtype=torch.uint8)
    at = []
    for place in range(0, size, 2):
        other = usual.clone()
        other[0, place : place + 2] = torch.tensor([0, 0x7C], dtype=torch.uint8)
        halves = [t for t in KINDS[kind].scales(other) if t is not None]
        if any(t.dtype is torch.float16 and t.isinf().any() for t in halves):
            at.append(place)
    return at


@both
@pytest.mark.parametrize("size", SIZES)
def test_the_hash_is_what_it_is_said_to_be(look: Look, size: int) -> None:
    octets = octets_of(size)
    content, expected = bytes(octets.numpy()), b""
    for start in range(0, size // HASHED * HASHED, HASHED):
        words = np.frombuffer(content[start : start + HASHED], "<u8").tolist()
        total = sum(word * (2 * place + 1) for place, word in enumerate(words))
        expected += (total * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "little")
    expected += content[size // HASHED * HASHED :]
    assert look(octets, NOTHING).hashed == expected


@both
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", FLOATS)
def test_floats_are_counted_as_torch_counts_them(look: Look, kind: str, size: int) -> None:
    floats = octets_of(size).view(FLOATS[kind])
    flat = torch.where(floats.float().isfinite(), floats.float(), 0.0).to(FLOATS[kind])
    flat[::7] = 0.0
    flat[3::7] = -0.0
    found = look(flat.view(torch.uint8), kind)
    wide = flat.double()
    assert found.numbers == wide.numel()
    assert found.zeros == int((wide == 0).sum())
    assert found.largest == (float(wide.abs().max()) if size else 0.0)


@both
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 40_000, -1])
@pytest.mark.parametrize("kind", FLOATS)
def test_one_value_that_is_not_finite_is_found(
    look: Look, kind: str, place: int, value: float
) -> None:
    floats = torch.ones(100_000).to(FLOATS[kind])
    floats[place] = math.nan if kind == "F8_E4M3" else value  # which has no infinity
    assert not math.isfinite(look(floats.view(torch.uint8), kind).largest)


@both
def test_powers_of_two(look: Look) -> None:
    octets = octets_of(3 * HASHED + 5) % 200
    found = look(octets, POWERS)
    assert found[1:] == (len(octets), 0, 2.0 ** (199 - 127), 0)
    octets[77_777] = 255
    assert math.isnan(look(octets, POWERS).largest)


@both
@pytest.mark.parametrize("count", [1, 3, 4099])
@pytest.mark.parametrize("kind", KINDS)
def test_scales_in_blocks_are_counted(look: Look, kind: str, count: int) -> None:
    blocks = blocks_of(kind, count)
    blocks[::5] = 0
    seen = magnitudes(blocks, kind)
    found = look(blocks.flatten(), kind)
    assert found.numbers == seen.numel()
    assert found.zeros == int((seen == 0).sum())
    assert found.largest == float(seen.max())
    assert found.damaged == 0
    assert found == plainly(blocks.flatten(), kind)


@both
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].levels is None])
def test_damaged_blocks_are_counted(look: Look, kind: str) -> None:
    places = offsets_of(kind)
    assert places
    for place in places:
        for bits in (0x7C00, 0xFC00, 0x7C01, 0xFFFF):
            blocks = blocks_of(kind, 4099)
            hit = blocks[[0, 1500, 4098]]
            hit[:, place], hit[:, place + 1] = bits & 255, bits >> 8
            blocks[[0, 1500, 4098]] = hit
            assert look(blocks.flatten(), kind).damaged == 3


@both
@pytest.mark.parametrize(("kind", "places", "value"), [("MXFP4", 1, 253), ("NVFP4", 4, 127)])
def test_blocks_with_a_byte_that_is_no_scale(
    look: Look, kind: str, places: int, value: int
) -> None:
    for place in range(places):
        blocks = blocks_of(kind, 4099)
        blocks[[0, 1500, 4098], place] = value
        assert look(blocks.flatten(), kind).damaged == 3


@pytest.mark.skipif(COMPILED is None, reason="there was no C++ compiler at installation")
@pytest.mark.parametrize("kind", [*WIDTHS, *KINDS])
def test_compiled_code_finds_what_numpy_finds_in_anything(kind: str) -> None:
    for seed in range(3):
        octets = octets_of(5003 * unit_of(kind), seed)
        one, other = compiled(octets, kind), plainly(octets, kind)
        if one.damaged:  # what else there is does not count then
            one, other = (Found(f.hashed, damaged=f.damaged) for f in (one, other))
        assert repr(one) == repr(other)  # NaN is NaN


@pytest.mark.skipif(COMPILED is None, reason="there was no C++ compiler at installation")
@pytest.mark.parametrize("every", [1, 7, 5003, 9000])
def test_one_block_in_so_many_is_kept(tmp_path: Path, every: int) -> None:
    blocks = blocks_of("Q6_K", 5003)
    file = tmp_path / "blocks"
    file.write_bytes(bytes(3) + bytes(blocks.numpy()))
    with Backlog(COMPILED, 2) as backlog:
        looking = Looking(backlog, file, (3, 3 + blocks.numel()), "Q6_K", blocks.shape[1], every)
        looking.found()
        assert looking.sample() == bytes(blocks[::every].numpy())


@pytest.mark.skipif(COMPILED is None, reason="there was no C++ compiler at installation")
def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    file = tmp_path / "short"
    file.write_bytes(bytes(5 * HASHED))
    with Backlog(COMPILED, 1) as backlog:
        with pytest.raises(EOFError):
            Looking(backlog, file, (0, 5 * HASHED + 1), NOTHING, 1).found()
        with pytest.raises(IsADirectoryError):
            Looking(backlog, tmp_path, (0, HASHED), NOTHING, 1).found()
        with pytest.raises(FileNotFoundError):
            Looking(backlog, tmp_path / "none", (0, HASHED), NOTHING, 1)
