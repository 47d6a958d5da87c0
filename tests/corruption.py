"""Ways in which a checkpoint can be wrong: each changes a copy, or says that it does not apply.

Files are taken apart and written by hand, since libraries do not write what must be refused.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from checkpoints import FIXTURES, config_of
from thin import THIN, fixture

from cabochon.load.report import inspect_checkpoint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What can be taken for one another: as many bits.
_ALIKE = (
    ("BF16", "F16", "I16", "U16"),
    ("F32", "I32", "U32"),
    ("F64", "I64", "U64"),
    ("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
)
_METHODS = ("compressed-tensors", "bitsandbytes", "gptq", "awq", "auto-round", "modelopt", "fp8",
            "gemma", "torchao", "mlx", "quark")  # fmt: skip


class Unfit(Exception):  # it is no error: a way that does not apply to a checkpoint
    """This checkpoint has nothing that could be wrong in this way."""


@dataclass
class Stored:
    """An entry of a header, with its bytes."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes

    def entry(self, start: int) -> dict[str, Any]:
        offsets = [start, start + len(self.data)]
        return {"dtype": self.dtype, "shape": self.shape, "data_offsets": offsets}


class Copy:
    """A checkpoint in a folder of its own, to be damaged."""

    def __init__(self, source: Path, folder: Path) -> None:
        shutil.copytree(source, folder)
        self.source = source
        self.folder = folder
        self.file = folder / WEIGHTS

    def read(self) -> list[Stored]:
        raw = self.file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        header.pop("__metadata__", None)
        return [
            Stored(name, entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        ]

    def write(
        self,
        tensors: list[Stored],
        change: Callable[[list[dict[str, Any]]], object] = lambda entries: None,
        file: Path | None = None,
    ) -> None:
        """Write `tensors`, whose header entries `change` may alter. Names may occur twice."""
        entries, start = [], 0
        for tensor in tensors:
            entries.append(tensor.entry(start))
            start += len(tensor.data)
        change(entries)
        pairs = zip(tensors, entries, strict=True)
        text = ",".join(f"{json.dumps(t.name)}:{json.dumps(entry)}" for t, entry in pairs)
        header = f'{{"__metadata__":{json.dumps(self.metadata())},{text}}}'.encode()
        body = b"".join(tensor.data for tensor in tensors)
        (file or self.file).write_bytes(struct.pack("<Q", len(header)) + header + body)

    def metadata(self) -> dict[str, str]:
        """What the header says of the whole file: some producers describe their tensors there."""
        with (self.source / WEIGHTS).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            found: dict[str, str] = json.loads(file.read(length)).get("__metadata__", {})
        return found

    def config(self, change: Callable[[dict[str, Any]], object]) -> None:
        config = config_of(self.folder)
        change(config)
        (self.folder / "config.json").write_text(json.dumps(config))


Words = tuple[str, ...]

# Returns words of which a refusal must have one.
Wound = Callable[[Copy, random.Random], Words]


@cache
def holdings(source: Path) -> Mapping[str, str]:
    """What each stored tensor of a sound checkpoint holds: "codes", "scales"; by its own scheme."""
    plan = inspect_checkpoint(source).plan
    assert plan is not None
    return {
        read.stored[slot.leaf].name: slot.holds
        for read in plan.sites
        for slot in read.scheme.slots
        if slot.leaf in read.stored
    }


def scales(copy: Copy, tensors: list[Stored]) -> list[Stored]:
    """Those that entries are multiplied with, in a dtype that numpy can be told to read."""
    wanted = {"scales", "divisor", "factor"}
    held = holdings(copy.source)
    return some([t for t in tensors if held.get(t.name) in wanted and t.dtype in _FLOATS])


_FLOATS: Mapping[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),
}


def floats(tensor: Stored) -> np.ndarray[Any, Any]:
    numbers = np.frombuffer(tensor.data, _FLOATS[tensor.dtype])
    if tensor.dtype == "BF16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32)


def as_bytes(tensor: Stored, values: np.ndarray[Any, Any]) -> bytes:
    if tensor.dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype(_FLOATS[tensor.dtype]).tobytes()


def some(found: list[Stored]) -> list[Stored]:
    if not found:
        raise Unfit
    return found


def place(tensor: Stored) -> Words:
    """Its module or its leaf: reports write the numbers of layers and experts as ranges."""
    return tuple([part for part in tensor.name.split(".") if not part.isdecimal()][-3:])


def header_byte(copy: Copy, chance: random.Random) -> Words:
    raw = bytearray(copy.file.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    raw[chance.randrange(8 + length)] = chance.choice(b'aZ09"[]{},:_.\x00\xff')
    copy.file.write_bytes(raw)
    return (WEIGHTS, "model.", "_projection")  # the file, or a tensor


def cut(copy: Copy, chance: random.Random) -> Words:
    raw = copy.file.read_bytes()
    copy.file.write_bytes(raw[: chance.randrange(len(raw))])
    return (WEIGHTS,)


def overlap(copy: Copy, chance: random.Random) -> Words:
    tensors = copy.read()
    at = chance.randrange(1, len(tensors))

    def change(entries: list[dict[str, Any]]) -> None:
        step = chance.randint(1, 64)
        entries[at]["data_offsets"] = [max(0, o - step) for o in entries[at]["data_offsets"]]

    copy.write(tensors, change)
    return (WEIGHTS,)


def past_the_end(copy: Copy, chance: random.Random) -> Words:
    tensors = copy.read()

    def change(entries: list[dict[str, Any]]) -> None:
        entry = entries[chance.randrange(len(entries))]
        step = chance.choice((1, 1 << 20, 1 << 62))
        entry["data_offsets"] = [offset + step for offset in entry["data_offsets"]]

    copy.write(tensors, change)
    return (WEIGHTS,)


def duplicate(copy: Copy, chance: random.Random) -> Words:
    tensors = copy.read()
    twice = chance.choice(tensors)
    copy.write([*tensors, twice])
    return (twice.name,)


def renamed(copy: Copy, chance: random.Random) -> Words:
    tensors = copy.read()
    tensor = chance.choice(tensors)
    words, at = place(tensor), chance.randrange(len(tensor.name))
    tensor.name = f"{tensor.name[:at]}{chance.choice('xq_9')}{tensor.name[at:]}"
    copy.write(tensors)
    return (*words, *place(tensor))


def dropped(copy: Copy, chance: random.Random) -> Words:
    tensors = copy.read()
    gone = tensors.pop(chance.randrange(len(tensors)))
    copy.write(tensors)
    return place(gone)


def doubled(copy: Copy, chance: random.Random) -> Words:
    tensors = copy.read()
    prefix, other = "model.language_model.", "language_model.model."
    found = some([tensor for tensor in tensors if tensor.name.startswith(prefix)])
    twin = chance.choice(found)
    name = other + twin.name.removeprefix(prefix)
    copy.write([*tensors, Stored(name, twin.dtype, twin.shape, twin.data)])
    return place(twin)


def transposed(copy: Copy, chance: random.Random) -> Words:
    tensors = copy.read()
    found = some([t for t in tensors if len(set(t.shape)) > 1])  # a square shows nothing
    tensor = chance.choice(found)
    tensor.shape = tensor.shape[::-1]
    copy.write(tensors)
    return place(tensor)


def retyped(copy: Copy, chance: random.Random) -> Words:
    tensors = copy.read()
    tensor = chance.choice(tensors)
    alike = next(kinds for kinds in _ALIKE if tensor.dtype in kinds)
    tensor.dtype = chance.choice([kind for kind in alike if kind != tensor.dtype])
    copy.write(tensors)
    return place(tensor)


def zeroed(copy: Copy, chance: random.Random) -> Words:
    tensors = copy.read()
    tensor = chance.choice(scales(copy, tensors))
    tensor.data = bytes(len(tensor.data))
    copy.write(tensors)
    return place(tensor)


def not_a_number(copy: Copy, chance: random.Random) -> Words:
    tensors = copy.read()
    tensor = chance.choice(some([t for t in tensors if t.dtype in _FLOATS and t.data]))
    values = floats(tensor).copy()
    bound = tensor.name.endswith(("_min", "_max"))  # an infinite one bounds nothing
    values[chance.randrange(len(values))] = np.nan if bound else chance.choice((np.nan, np.inf))
    tensor.data = as_bytes(tensor, values)
    copy.write(tensors)
    return (tensor.name,)


def enlarged(copy: Copy, chance: random.Random) -> Words:
    tensors = copy.read()
    tensor = chance.choice(scales(copy, tensors))
    with np.errstate(over="ignore"):
        tensor.data = as_bytes(tensor, floats(tensor) * 1000)
    copy.write(tensors)
    return place(tensor)


def regrouped(copy: Copy, chance: random.Random) -> Words:
    tensors = copy.read()
    found = [t for t in scales(copy, tensors) if len(t.shape) > 1 and t.shape[-1] > 1]
    tensor = chance.choice(some(found))
    count = tensor.shape[-1] + chance.choice((-1, 1))
    width = len(tensor.data) // tensor.shape[-1] // int(np.prod(tensor.shape[:-1]))
    row = tensor.shape[-1] * width
    rows = [tensor.data[at : at + row] for at in range(0, len(tensor.data), row)]
    tensor.data = b"".join((row + row[-width:])[: count * width] for row in rows)
    tensor.shape = [*tensor.shape[:-1], count]
    copy.write(tensors)
    return place(tensor)


def wrong_method(copy: Copy, chance: random.Random) -> Words:
    def change(config: dict[str, Any]) -> None:
        described = config.get("quantization_config")
        if described is None:
            raise Unfit
        others = [m for m in _METHODS if m != described.get("quant_method")]
        described["quant_method"] = chance.choice(others)

    copy.config(change)
    return ("config.json", "quant", "config group")


def strange_config(copy: Copy, chance: random.Random) -> Words:
    """What another producer said of its files, of the same architecture."""
    own = config_of(copy.source)

    def change(config: dict[str, Any]) -> None:
        others = [
            other["quantization_config"]
            for other in map(config_of, folders())
            if other["architectures"] == own["architectures"]
            and other.get("quantization_config") not in (None, own.get("quantization_config"))
        ]
        if not others:
            raise Unfit
        config["quantization_config"] = chance.choice(others)

    copy.config(change)
    return ("config.json", "quant", "config group")


def strange_shard(copy: Copy, chance: random.Random) -> Words:
    """Half of the tensors come from another checkpoint, whose own half has other names or sizes."""
    tensors = copy.read()
    other = chance.choice([folder for folder in folders() if folder != copy.source])
    foreign = Copy(other, copy.folder / "other").read()
    half = len(tensors) // 2
    if {(t.name, t.dtype, tuple(t.shape)) for t in foreign[half:]} == {
        (t.name, t.dtype, tuple(t.shape)) for t in tensors[half:]
    }:
        raise Unfit
    shards = {"a.safetensors": tensors[:half], "b.safetensors": tensors[half:]}
    weight_map = {t.name: name for name, held in shards.items() for t in held}
    shards["b.safetensors"] = foreign[half:]
    for name, held in shards.items():
        copy.write(held, file=copy.folder / name)
    copy.file.unlink()
    (copy.folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    strange = {part for t in foreign[half:] for part in place(t)}
    return ("b.safetensors", *strange)


def traversal(copy: Copy, chance: random.Random) -> Words:
    tensors = copy.read()
    shard = chance.choice(("../model.safetensors", "/etc/passwd", "..\\x.safetensors", "a\0.safe"))
    (copy.folder / INDEX).write_text(json.dumps({"weight_map": {t.name: shard for t in tensors}}))
    return (INDEX,)


WOUNDS: Mapping[str, Wound] = {
    wound.__name__: wound
    for wound in (
        header_byte,
        cut,
        overlap,
        past_the_end,
        duplicate,
        renamed,
        dropped,
        doubled,
        transposed,
        retyped,
        zeroed,
        not_a_number,
        enlarged,
        regrouped,
        wrong_method,
        strange_config,
        strange_shard,
        traversal,
    )
}


class Gguf:
    """A GGUF file, with what lies beside it, to be damaged."""

    def __init__(self, source: Path, folder: Path) -> None:
        shutil.copytree(source.parent, folder)
        self.file = folder / source.name
        reader = gguf.GGUFReader(source)
        self.data_starts = reader.data_offset
        tensors = [tensor.field for tensor in reader.tensors]
        # name length and name, number of axes, axes, type, offset
        self.offsets = [field.offset + sum(p.nbytes for p in field.parts[:-1]) for field in tensors]

    def put(self, at: int, value: int) -> None:
        with self.file.open("r+b") as file:
            file.seek(at)
            file.write(struct.pack("<Q", value))


GgufWound = Callable[[Gguf, random.Random], object]


def inflated_tensor_count(copy: Gguf, chance: random.Random) -> None:
    copy.put(8, chance.choice((len(copy.offsets) + 1, 1 << 20, 1 << 40, (1 << 64) - 1)))


def inflated_metadata_count(copy: Gguf, chance: random.Random) -> None:
    copy.put(16, chance.choice((1 << 10, 1 << 20, 1 << 40, (1 << 64) - 1)))


def moved_tensor(copy: Gguf, chance: random.Random) -> None:
    copy.put(chance.choice(copy.offsets), chance.choice((1, 32, 1 << 20, 1 << 40, (1 << 64) - 32)))


def cut_file(copy: Gguf, chance: random.Random) -> None:
    size = copy.file.stat().st_size
    with copy.file.open("r+b") as file:
        file.truncate(chance.randrange(size))


def byte_of_header(copy: Gguf, chance: random.Random) -> None:
    with copy.file.open("r+b") as file:
        file.seek(chance.randrange(copy.data_starts))
        file.write(bytes([chance.randrange(256)]))


GGUF_WOUNDS: Mapping[str, GgufWound] = {
    wound.__name__: wound
    for wound in (
        inflated_tensor_count,
        inflated_metadata_count,
        moved_tensor,
        cut_file,
        byte_of_header,
    )
}


@cache
def folders() -> tuple[Path, ...]:
    """Every fixture of safetensors; what is kept thin is made whole."""
    found = sorted(path.parent for path in FIXTURES.rglob(WEIGHTS))
    return tuple(fixture(path.name) if path.parent == THIN else path for path in found)


def files() -> tuple[Path, ...]:
    """Every fixture that is a GGUF file, or the first of its parts; projectors are none."""
    found = sorted(FIXTURES.rglob("*.gguf"))
    return tuple(path for path in found if "mmproj" not in path.name and not _later(path.name))


def _later(name: str) -> bool:
    return "-of-" in name and "-00001-of-" not in name
