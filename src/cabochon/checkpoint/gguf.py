"""GGUF headers, parsed and checked by us: metadata, names, types, shapes and spans, but no weights.

Headers are input from strangers. The format (https://github.com/ggml-org/ggml, docs/gguf.md):
`GGUF`, a version, the counts of tensors and of metadata, the metadata, the tensors' descriptions,
then the tensors, each at the next multiple of the alignment. Everything is little-endian.

A saved header is what precedes the tensors, in a file of the same name with `.header` behind it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cabochon.checkpoint.headers import BITS, HEADER_ONLY, MAX_HEADER_BYTES, MAX_NAME, TensorMeta
from cabochon.errors import UnreadableError

MAGIC = b"GGUF"
MAX_AXES = 4
MAX_NESTING = 2  # of arrays in metadata; the writers in use nest none

# Blocks of ggml (ggml-common.h): entries of a row that are stored together, and in how many bytes.
BLOCKS: Mapping[str, tuple[int, int]] = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
    "MXFP4": (32, 17), "NVFP4": (64, 36),
    # known by size alone: a file that has them is read, and refused by the tensor's name
    "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ1_S": (256, 50),
    "IQ1_M": (256, 56), "TQ1_0": (256, 54), "TQ2_0": (256, 66), "Q1_0": (128, 18),
    "Q2_0": (64, 18),
}  # fmt: skip

_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip

# Of metadata: struct's letter for each number. 7 is a bool, 8 a string, 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9

_WINDOW = 1 << 20  # bytes of a list of texts that are taken apart together

Metadata = Mapping[str, Any]  # bool, int, float, str, or a tuple of these


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of one file. `tensors` are in the order of their bytes, shapes as `[out, in]`."""

    path: Path
    metadata: Metadata
    tensors: tuple[TensorMeta, ...]


def read_gguf(path: Path, size: int | None = None) -> GgufFile:
    """The header of the GGUF file `path`, or the saved header of one.

    Args:
        path: the file. If it ends with `.header`, the tensors are not in it.
        size: bytes of the whole file that a saved header is of, where that is known.

    Raises:
        UnreadableError: no such file, or anything in it that is not exactly as the format wants it.
    """
    reader, metadata, described, alignment = _opened(path)
    start = -(-reader.at // alignment) * alignment
    if path.suffix != HEADER_ONLY:
        size = reader.size
    elif not reader.at <= reader.size <= start:
        raise UnreadableError(f"{path} goes on after byte {start}; a saved header ends there")
    metas = _laid_out(path, described, start, alignment, size)
    return GgufFile(path, metadata, metas)


def header_length(path: Path) -> int:
    """Bytes of the header that the file `path` begins with; its tensors need not be there.

    Raises:
        UnreadableError: as `read_gguf`, and where the file ends within the header.
    """
    return _opened(path)[0].at


def _opened(path: Path) -> tuple[_Reader, Metadata, list[_Described], int]:
    """The header's parts, the reader behind them, and the alignment of what follows."""
    try:
        with path.open("rb") as file:
            reader = _Reader(file, path)
            tensors, pairs = reader.opening()
            metadata: dict[str, Any] = {}
            for _ in range(pairs):
                key = reader.string("a key of the metadata", MAX_NAME)
                if key in metadata:
                    raise reader.wrong(f"the metadata has {key!r} twice")
                metadata[key] = reader.value(reader.number("I", key), key)
            described = [_Described.read(reader) for _ in range(tensors)]
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}") from None
    return reader, metadata, described, _alignment(path, metadata)


class _Reader:
    """Takes values off a header, never more than the file has left."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self.size = file.seek(0, 2)
        self._end = min(self.size, MAX_HEADER_BYTES)
        self.at = 0
        file.seek(0)

    def opening(self) -> tuple[int, int]:
        """How many tensors and how many pairs of metadata follow."""
        if self.take(4, "the first bytes") != MAGIC:
            raise UnreadableError(f"{self._path} does not begin with {MAGIC.decode()!r}: no GGUF")
        version = self.number("I", "the version")
        if version not in (2, 3):
            old = "; convert the model again" if version == 1 else ""
            swapped = " (big-endian)" if int.from_bytes(struct.pack("<I", version)) < 10 else ""
            raise self.wrong(f"GGUF version {version}{swapped}, this version reads 2 and 3{old}")
        tensors, pairs = self.number("Q", "a count"), self.number("Q", "a count")
        # The least that a description and a pair take.
        for count, least, what in ((tensors, 24, "tensors"), (pairs, 13, "pairs of metadata")):
            if count * least > self._end - self.at:
                raise self.wrong(f"{count} {what} do not fit into what is left of its header")
        return tensors, pairs

    def wrong(self, detail: str) -> UnreadableError:
        return UnreadableError(f"{self._path}, header at byte {self.at}: {detail}")

    def take(self, count: int, what: str) -> bytes:
        if count > self._end - self.at:
            if self._end == self.size:
                raise UnreadableError(
                    f"{self._path} is cut off: {what} at byte {self.at} should take {count} bytes,"
                    f" the file has {self.size}. Download it again."
                )
            raise self.wrong(f"{what} reaches beyond the {MAX_HEADER_BYTES} bytes allowed")
        data = self._file.read(count)
        self.at += len(data)
        if len(data) < count:  # it was cut since its size was asked for
            raise self.wrong(f"the file ends inside of {what}")
        return data

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def string(self, what: str, most: int | None = None) -> str:
        length = self.number("Q", what)
        if most is not None and length > most:
            raise self.wrong(f"{what} has {length} bytes, more than the {most} allowed")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is no UTF-8: {error.reason}") from None

    def value(self, kind: int, key: str, nesting: int = 0) -> Any:
        """A value of the metadata; arrays as tuples."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], key)
        if kind == _BOOL:
            return self._bools(self.take(1, key), key)[0]
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY and nesting < MAX_NESTING:
            return self._array(key, nesting)
        raise self.wrong(f"{key} is of type {kind}, which the format does not have here")

    def _array(self, key: str, nesting: int) -> tuple[Any, ...]:
        kind, count = self.number("I", key), self.number("Q", key)
        if kind in _NUMBERS:
            code = _NUMBERS[kind]
            width = struct.calcsize(f"<{code}")
            return struct.unpack(f"<{count}{code}", self.take(count * width, key))
        if kind == _BOOL:
            return self._bools(self.take(count, key), key)
        least = 8 if kind == _STRING else 12
        if count * least > self._end - self.at:
            raise self.wrong(f"{key} has {count} entries, which do not fit into the header")
        if kind == _STRING:
            return tuple(self._strings(count, key))
        return tuple(self.value(kind, key, nesting + 1) for _ in range(count))

    def _strings(self, count: int, key: str) -> list[str]:
        """What `string` reads so many times, but half a million of a vocabulary without a wait."""
        found: list[str] = []
        length = struct.Struct("<Q").unpack_from
        while len(found) < count:
            block = self._file.read(min(_WINDOW, self._end - self.at))
            at = 0
            with suppress(UnicodeDecodeError, struct.error):
                for _ in range(count - len(found)):
                    start = at + 8
                    stop = start + length(block, at)[0]
                    if stop > len(block):
                        break
                    found.append(block[start:stop].decode())
                    at = stop
            self.at += at
            self._file.seek(self.at)
            if len(found) < count:  # one that goes on behind the block, or is wrong
                found.append(self.string(key))
        return found

    def _bools(self, data: bytes, key: str) -> tuple[bool, ...]:
        if data.translate(None, b"\0\1"):
            raise self.wrong(f"{key} holds a bool that is neither 0 nor 1")
        return tuple(map(bool, data))


@dataclass(frozen=True, slots=True)
class _Described:
    """What a header says of a tensor."""

    name: str
    shape: tuple[int, ...]  # slowest axis first
    type: int
    offset: int

    @classmethod
    def read(cls, reader: _Reader) -> _Described:
        name = reader.string("a tensor's name", MAX_NAME)
        axes = reader.number("I", name)
        if axes > MAX_AXES:
            raise reader.wrong(f"tensor {name!r} has {axes} axes, at most {MAX_AXES} are allowed")
        shape = tuple(reader.number("Q", name) for _ in range(axes))
        return cls(name, shape[::-1], reader.number("I", name), reader.number("Q", name))


def _alignment(path: Path, metadata: Metadata) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 8 <= value <= 1 << 20 or value & (value - 1):
        raise UnreadableError(
            f"{path}: general.alignment is {value!r}, expected a power of two from 8 on"
        )
    return value


def _laid_out(
    path: Path, described: Sequence[_Described], start: int, alignment: int, size: int | None
) -> tuple[TensorMeta, ...]:
    """The tensors' spans: in a row, each at the next multiple of the alignment, to the end."""
    end, before = start, "the header"
    metas: dict[str, TensorMeta] = {}
    for tensor in sorted(described, key=lambda tensor: tensor.offset):
        if tensor.name in metas:
            raise UnreadableError(f"{path} has tensor {tensor.name!r} twice")
        begin = start + tensor.offset
        if begin != end:
            kind = "overlaps" if begin < end else "leaves a gap after"
            raise UnreadableError(
                f"{path}: tensor {tensor.name!r} at byte {begin} {kind} {before}; it should begin"
                f" at {end}"
            )
        stop = begin + _nbytes(path, tensor)
        dtype = _TYPES[tensor.type]
        metas[tensor.name] = TensorMeta(tensor.name, dtype, tensor.shape, path, (begin, stop))
        end, before = -(-stop // alignment) * alignment, f"tensor {tensor.name!r}"
        if size is not None and stop > size:
            raise UnreadableError(
                f"{path} is cut off: {before} should end at byte {stop}, the file has {size} bytes."
                " Download it again."
            )
    if size is not None and size > end:
        raise UnreadableError(f"{path} has {size - end} bytes after its last tensor, at byte {end}")
    return tuple(metas.values())


def _nbytes(path: Path, tensor: _Described) -> int:
    where = f"{path}: tensor {tensor.name!r}"
    dtype = _TYPES.get(tensor.type)
    if dtype is None:
        raise UnreadableError(f"{where} is of type {tensor.type}, which this version does not know")
    if not all(tensor.shape):
        raise UnreadableError(f"{where} has shape {list(tensor.shape)}, which holds nothing")
    if dtype not in BLOCKS:
        return math.prod(tensor.shape) * BITS[dtype] // 8
    entries, nbytes = BLOCKS[dtype]
    width = tensor.shape[-1] if tensor.shape else 1
    if width % entries:
        raise UnreadableError(
            f"{where} is {dtype} and has rows of {width}, which is no multiple of {entries}"
        )
    return math.prod(tensor.shape) // entries * nbytes
