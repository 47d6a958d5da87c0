"""Safetensors headers, parsed and checked by us: names, dtypes, shapes and spans, but no bytes.

Headers are input from strangers. The format (https://github.com/huggingface/safetensors): eight
bytes of little-endian length, that much JSON, then the tensors, without gap or overlap, to the end.

A saved header is what precedes the tensors, nothing changed, in a file of the same name with
`.header` behind it: enough to plan a load, and megabytes instead of gigabytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from cabochon.errors import UnreadableError
from cabochon.files import parse_json

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
HEADER_ONLY = ".header"
MAX_NAME = 1000  # characters; every rule of a configuration may be tried on each name

BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """One entry of a header. `span` is in bytes from the start of `file`."""

    name: str
    dtype: str  # safetensors' name: "BF16", "I32", ...
    shape: tuple[int, ...]
    file: Path
    span: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.span[1] - self.span[0]

    def rows(self, start: int, stop: int) -> TensorMeta:
        """Rows `start` to `stop` of the first axis alone."""
        assert 0 <= start <= stop <= self.shape[0], (self.name, start, stop, self.shape)
        size = self.nbytes // self.shape[0] if self.shape[0] else 0
        first = self.span[0]
        span = (first + start * size, first + stop * size)
        return replace(self, shape=(stop - start, *self.shape[1:]), span=span)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Header:
    """A header: its free text, and the tensors in the order of their bytes."""

    metadata: Mapping[str, str]
    tensors: tuple[TensorMeta, ...]


def read_header(path: Path, size: int | None = None) -> Header:
    """The header of the safetensors file `path`, or the saved header of one.

    Args:
        path: the file. If it ends with `.header`, the tensors are not in it.
        size: bytes of the whole file that a saved header is of, where that is known.

    Raises:
        UnreadableError: no such file, or anything in it that is not exactly as the format wants it.
    """
    saved = path.suffix == HEADER_ONLY
    try:
        with path.open("rb") as file:
            here = file.seek(0, 2)
            start, entries = _entries(file, path, here)
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}") from None
    if saved and here != start:
        raise UnreadableError(
            f"{path} has {here - start} bytes after its header, at byte {start}: a saved header"
            " ends there"
        )
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    metas = [_meta(path, name, entry, start) for name, entry in entries.items()]
    metas.sort(key=lambda meta: meta.span)
    _check_spans(path, metas, start, size if saved else here)
    return Header(metadata, tuple(metas))


def _metadata(path: Path, found: Any) -> Mapping[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise UnreadableError(f"{path}: __metadata__ in the header is not a table of texts")
    return found


def _entries(file: BinaryIO, path: Path, size: int) -> tuple[int, dict[str, Any]]:
    """Where the tensors' bytes begin, and everything that the header says."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise UnreadableError(
            f"{path} is cut off: its header should take {length} bytes after byte 8,"
            f" the file has {size} bytes. Download it again."
        )
    if length > MAX_HEADER_BYTES:
        raise UnreadableError(
            f"{path} has a header of {length} bytes, more than the {MAX_HEADER_BYTES} allowed"
        )
    try:
        entries = parse_json(file.read(length))
    except ValueError as error:
        raise UnreadableError(f"{path}: the header at byte 8 is not valid: {error}") from None
    if not isinstance(entries, dict):
        raise UnreadableError(f"{path}: the header is a {type(entries).__name__}, not an object")
    return 8 + length, entries


def _meta(path: Path, name: str, entry: Any, start: int) -> TensorMeta:
    def fail(detail: str) -> UnreadableError:
        return UnreadableError(f"{path}: tensor {name!r}: {detail}")

    if len(name) > MAX_NAME:
        raise UnreadableError(f"{path}: a tensor's name has {len(name)} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail(f"expected dtype, shape and data_offsets, found {entry!r}"[:400])
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise fail(f"unknown dtype {dtype!r}")
    if not _naturals(shape):
        raise fail(f"shape {shape!r} is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail(f"data_offsets {offsets!r} are not a start and an end")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise fail(
            f"{dtype} {shape} needs {bits // 8} bytes, data_offsets {offsets}"
            f" hold {offsets[1] - offsets[0]}"
        )
    return TensorMeta(name, dtype, tuple(shape), path, (start + offsets[0], start + offsets[1]))


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_spans(path: Path, metas: Sequence[TensorMeta], start: int, size: int | None) -> None:
    """Refuse spans (sorted) that overlap, leave a gap, or do not end with the file."""
    end, before = start, "the header"
    for meta in metas:
        begin = meta.span[0]
        if begin != end:
            kind = "overlaps" if begin < end else "leaves a gap after"
            raise UnreadableError(
                f"{path}: tensor {meta.name!r} at byte {begin} {kind} {before}, which ends at {end}"
            )
        end, before = meta.span[1], f"tensor {meta.name!r}"
    if size is None:
        return
    if end > size:
        raise UnreadableError(
            f"{path} is cut off: {before} ends at byte {end}, the file has {size} bytes."
            " Download it again."
        )
    if end < size:
        raise UnreadableError(f"{path} has {size - end} bytes after its last tensor, at byte {end}")
