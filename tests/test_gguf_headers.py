"""GGUF headers: read as gguf-py reads them, and refused by name when they are not as they must be.

Sound files are written by gguf-py; damage is done to their bytes.
"""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.checkpoint.gguf import read_gguf
from cabochon.errors import UnreadableError

MEMORY = 200 << 20  # far below what inflated counts would take


def write(path: Path) -> Path:
    """A file with a value of every type and tensors of several."""
    writer = gguf.GGUFWriter(path, "gemma4")
    writer.add_uint8("t.uint8", 200)
    writer.add_int8("t.int8", -5)
    writer.add_uint16("t.uint16", 60_000)
    writer.add_int16("t.int16", -3)
    writer.add_uint32("t.uint32", 1 << 31)
    writer.add_int32("t.int32", -7)
    writer.add_float32("t.float32", 0.5)
    writer.add_uint64("t.uint64", 1 << 60)
    writer.add_int64("t.int64", -(1 << 50))
    writer.add_float64("t.float64", 1e300)
    writer.add_bool("t.bool", True)
    writer.add_string("t.string", "▁the\n")
    writer.add_array("t.strings", ["a", "", "▁b"])
    writer.add_array("t.bools", [True, False])
    writer.add_array("t.floats", [0.25, -1.0])
    rng = np.random.default_rng(0)
    writer.add_tensor("dense", rng.normal(size=(3, 5)).astype(np.float32))
    writer.add_tensor("half", rng.normal(size=(2, 4, 6)).astype(np.float16))
    rows = rng.integers(0, 256, (4, 2 * 18), dtype=np.uint8)
    writer.add_tensor("blocks", rows, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "sound.gguf")


def test_reads_what_gguf_reads(sound: Path) -> None:
    ours, theirs = read_gguf(sound), gguf.GGUFReader(sound)
    for key, value in ours.metadata.items():
        expected = theirs.fields[key].contents()
        assert value == (tuple(expected) if isinstance(expected, list) else expected), key
    assert {"GGUF." + key for key in ("version", "tensor_count", "kv_count")} == set(
        theirs.fields
    ) - set(ours.metadata)
    assert len(ours.tensors) == len(theirs.tensors)
    for meta, tensor in zip(ours.tensors, theirs.tensors, strict=True):
        assert meta.name == tensor.name
        assert meta.dtype == tensor.tensor_type.name
        assert list(meta.shape) == [int(n) for n in reversed(tensor.shape)]
        assert meta.span == (tensor.data_offset, tensor.data_offset + tensor.n_bytes)


def altered(sound: Path, folder: Path, old: bytes, new: bytes) -> Path:
    data = sound.read_bytes()
    assert data.count(old) == 1
    path = folder / "altered.gguf"
    path.write_bytes(data.replace(old, new))
    return path


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str) -> bytes:
    return u64(len(value.encode())) + value.encode()


HUGE = (1 << 64) - 1
TENSOR = text("dense") + u32(2) + u64(5) + u64(3) + u32(0)

# What the sound file has, what stands there instead, and what the refusal says.
DAMAGE = {
    "magic": (b"GGUF" + u32(3), b"GGUX" + u32(3), "no GGUF"),
    "version 1": (b"GGUF" + u32(3), b"GGUF" + u32(1), "version 1"),
    "version 9": (b"GGUF" + u32(3), b"GGUF" + u32(9), "version 9"),
    "big-endian": (b"GGUF" + u32(3), b"GGUF" + b"\0\0\0\3", "big-endian"),
    "tensor count": (u32(3) + u64(3), u32(3) + u64(HUGE), "tensors do not fit"),
    "string length": (text("▁the\n"), u64(HUGE) + "▁the\n".encode(), "t.string"),
    "key length": (text("t.bool"), u64(1 << 40) + b"t.bool", "a key of the metadata"),
    "array length": (u32(8) + u64(3) + text("a"), u32(8) + u64(HUGE) + text("a"), "t.strings"),
    "numbers in an array": (
        text("t.floats") + u32(9) + u32(6) + u64(2),
        text("t.floats") + u32(9) + u32(6) + u64(1 << 61),
        "t.floats",
    ),
    "type of a value": (text("t.bool") + u32(7), text("t.bool") + u32(77), "type 77"),
    "nested arrays": (text("t.bools") + u32(9) + u32(7), text("t.bools") + u32(9) + u32(9), "t.bo"),
    "a bool of 2": (text("t.bool") + u32(7) + b"\1", text("t.bool") + u32(7) + b"\2", "a bool"),
    "no UTF-8": (text("▁the\n"), u64(7) + b"\xff\xff\xffthe\n", "t.string is no UTF-8"),
    "twice a key": (text("t.int8"), text("t.bool"), "'t.bool' twice"),
    "twice a name": (text("blocks"), text("dense"), "'dense' twice"),
    "axes": (TENSOR, TENSOR.replace(u32(2), u32(9), 1), "9 axes"),
    "an axis of 0": (TENSOR, TENSOR.replace(u64(5) + u64(3), u64(0) + u64(3)), "holds nothing"),
    "an axis too long": (TENSOR, TENSOR.replace(u64(5) + u64(3), u64(5) + u64(HUGE)), "cut off"),
    "sizes that overflow": (
        TENSOR,
        TENSOR.replace(u64(5) + u64(3), u64(1 << 63) + u64(3)),
        "cut off",
    ),
    "a type": (TENSOR, TENSOR[:-4] + u32(99), "type 99"),
    "a type of blocks": (TENSOR, TENSOR[:-4] + u32(2), "no multiple of 32"),
    "an offset": (TENSOR + u64(0), TENSOR + u64(32), "leaves a gap"),
    "an offset twice": (u32(1) + u64(64), u32(1) + u64(32), "overlaps"),
    "an offset beyond": (TENSOR + u64(0), TENSOR + u64(HUGE), "leaves a gap"),
    "alignment": (
        text("t.string") + u32(8) + text("▁the\n"),
        text("general.alignment") + u32(4) + u32(12),
        "general.alignment",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_name(sound: Path, tmp_path: Path, name: str) -> None:
    old, new, words = DAMAGE[name]
    path = altered(sound, tmp_path, old, new)
    with pytest.raises(UnreadableError) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_bytes_too_many_and_too_few(sound: Path, tmp_path: Path) -> None:
    data = sound.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data + b"\0" * 32)
    with pytest.raises(UnreadableError, match="32 bytes after its last tensor"):
        read_gguf(path)
    for length in range(0, len(data) - 32, 7):
        path.write_bytes(data[:length])
        with pytest.raises(UnreadableError):
            read_gguf(path)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_damage_is_read_or_refused_within_bounds(sound: Path, data: st.DataObject) -> None:
    content = bytearray(sound.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        count = data.draw(st.sampled_from((1, 4, 8)))
        content[at : at + count] = data.draw(st.binary(min_size=count, max_size=count))
    path = sound.with_name("any.gguf")
    path.write_bytes(content)
    tracemalloc.start()
    try:
        read_gguf(path)
    except UnreadableError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused(sound: Path, tail: bytes) -> None:
    path = sound.with_name("bytes.gguf")
    path.write_bytes(b"GGUF" + u32(3) + tail)
    try:
        found = read_gguf(path)
    except UnreadableError:
        return
    assert not found.tensors
