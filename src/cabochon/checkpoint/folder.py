"""`Checkpoint`: the tensors of a folder, whichever files they lie in, and their bytes by range."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cabochon.checkpoint.gguf import BLOCKS
from cabochon.checkpoint.gguf_model import GgufModel, gguf_in, is_gguf, open_gguf
from cabochon.checkpoint.headers import HEADER_ONLY, Header, TensorMeta, read_header
from cabochon.errors import UnreadableError
from cabochon.files import read_json_object

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"

TORCH_NAMES: Mapping[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


Sizes = Mapping[str, int]  # bytes of a file, by its name


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Safetensors, or a model in GGUF, whose headers have been read and found sound."""

    folder: Path  # where config.json and its like lie
    tensors: Mapping[str, TensorMeta]
    metadata: Mapping[str, str] = field(default_factory=dict)  # free text of the headers
    gguf: GgufModel | None = None  # what takes the place of config.json and its like

    @classmethod
    def open(cls, path: Path, sizes: Sizes | None = None) -> Checkpoint:
        """Read the headers of one file, or of those that make up the model in a folder.

        In a folder that is `model.safetensors`, or the shards that its index names; the index is
        honoured, not the directory: other safetensors files in it are not looked at. Without
        either, it is the one model in GGUF. A saved header stands for a file that is not there.
        `sizes`, where known, are those of whole files.

        Raises:
            UnreadableError: nothing to read, a file that is damaged, an index that does not agree.
        """
        if path.is_file() and path.name.endswith((_SUFFIX, _SUFFIX + HEADER_ONLY)):
            return cls._of(path.parent, [_header(path, sizes)])
        if path.is_file() and is_gguf(path):
            return cls._of_gguf(open_gguf(path, sizes))
        if not path.is_dir():
            raise UnreadableError(_not_a_folder(path))
        single, index = _stored(path / SINGLE), path / INDEX
        if index.is_file():
            return cls._of(path, _read_shards(path, weight_map(index), sizes))
        if single is not None:
            return cls._of(path, [_header(single, sizes)])
        file = gguf_in(path)
        if file is not None:
            return cls._of_gguf(open_gguf(file, sizes))
        raise UnreadableError(_nothing_to_read(path))

    @classmethod
    def _of(cls, folder: Path, headers: Iterable[Header]) -> Checkpoint:
        tensors: dict[str, TensorMeta] = {}
        metadata: dict[str, str] = {}
        for header in headers:
            tensors |= {meta.name: meta for meta in header.tensors}
            metadata |= header.metadata
        return cls(folder, tensors, metadata)

    @classmethod
    def _of_gguf(cls, model: GgufModel) -> Checkpoint:
        return cls(model.path.parent, model.tensors, gguf=model)

    @property
    def saved_headers(self) -> bool:
        """Whether there are headers here whose tensors are elsewhere."""
        return any(meta.file.suffix == HEADER_ONLY for meta in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """The tensor `name` in fresh memory. UnreadableError if its file ends early."""
        return read_tensor(self.tensors[name])


def read_tensor(meta: TensorMeta) -> Tensor:
    """The tensor that `meta` describes, in fresh memory; blocks of ggml as rows of bytes.

    UnreadableError if its file ends early.
    """
    if meta.dtype in BLOCKS:
        octets = replace(meta, dtype="U8", shape=(meta.nbytes,))
        return read_tensor(octets).view(*meta.shape[:-1], -1)
    return _read(meta, meta.shape, meta.span[0])


def _stored(path: Path) -> Path | None:
    """The file `path`, or in its place its saved header."""
    saved = path.with_name(path.name + HEADER_ONLY)
    return path if path.is_file() else saved if saved.is_file() else None


def _header(path: Path, sizes: Sizes | None) -> Header:
    return read_header(path, (sizes or {}).get(path.name.removesuffix(HEADER_ONLY)))


def _not_a_folder(path: Path) -> str:
    if path.exists():
        return (
            f"{path} is a file, but neither {_SUFFIX} nor .gguf; give one, or the folder that holds"
            f" config.json and {SINGLE}"
        )
    named_like_one = path.name.endswith((_SUFFIX, ".gguf"))
    return f"there is no {'file' if named_like_one else 'folder'} {path}"


def _nothing_to_read(folder: Path) -> str:
    suffixes = {path.suffix for path in folder.iterdir()}
    wanted = f"{folder} has neither {SINGLE} nor {INDEX}"
    if ".gguf" in suffixes:
        return f"{wanted}, and of GGUF only projectors (mmproj) or later parts, which are no model"
    if suffixes & {".bin", ".pt", ".pth", ".ckpt"}:
        return (
            f"{wanted}, but pickled weights (.bin, .pt), which are never read because they can run"
            " code. Convert them with transformers: save_pretrained(..., safe_serialization=True)"
        )
    return f"{wanted}, so there are no weights to read"


def weight_map(index: Path) -> Mapping[str, str]:
    """Tensor name to shard name, from the index; shard names are checked before any is opened."""
    shards: Any = read_json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UnreadableError(f"{index} has no weight_map from tensor names to files")
    for name, shard in shards.items():
        if not isinstance(shard, str) or not _plain(shard):
            raise UnreadableError(
                f"{index} puts tensor {name!r} into {shard!r}, which is not the plain name of a"
                " .safetensors file in its own folder"
            )
    if SINGLE not in shards.values() and _stored(index.parent / SINGLE) is not None:
        raise UnreadableError(
            f"{index.parent} has both {SINGLE} and {INDEX}, which does not name it: it is not clear"
            " which of them is the model. Move one of them away."
        )
    return shards


def _plain(name: str) -> bool:
    return name.endswith(".safetensors") and not set(name) & {"/", "\\", "\0"} and name[0] != "."


def _read_shards(
    folder: Path, weight_map: Mapping[str, str], sizes: Sizes | None
) -> Iterator[Header]:
    found: set[str] = set()
    for shard in sorted(set(weight_map.values())):
        path = _stored(folder / shard)
        if path is None:
            first = next(name for name, file in weight_map.items() if file == shard)
            raise UnreadableError(
                f"{folder / INDEX} names the shard {shard}, which is not there; it should hold"
                f" {first!r}. Download it."
            )
        header = _header(path, sizes)
        for meta in header.tensors:
            where = weight_map.get(meta.name)
            if where != shard:
                said = "does not list it" if where is None else f"puts it into {where}"
                raise UnreadableError(f"{path} holds tensor {meta.name!r}, but {INDEX} {said}")
            found.add(meta.name)
        yield header
    missing = [name for name in weight_map if name not in found]
    if missing:
        name = missing[0]
        raise UnreadableError(
            f"{folder / INDEX} puts {len(missing)} tensors where they are not, first {name!r}"
            f" into {weight_map[name]}"
        )


def _read(meta: TensorMeta, shape: tuple[int, ...], start: int) -> Tensor:
    import torch

    flat = torch.empty(math.prod(shape), dtype=getattr(torch, TORCH_NAMES[meta.dtype]))
    buffer = memoryview(flat.view(torch.uint8).numpy().data)
    done = 0
    try:
        with meta.file.open("rb", buffering=0) as file:
            while done < len(buffer):
                count = os.preadv(file.fileno(), [buffer[done:]], start + done)
                if count == 0:
                    break
                done += count
    except OSError as error:
        raise cannot_be_read(meta, error) from None
    if done < len(buffer):
        raise cut_off(meta, start + done)
    return flat.view(shape)


def cut_off(meta: TensorMeta, end: int) -> UnreadableError:
    """What to say of a file that ended at byte `end` since its header was read."""
    return UnreadableError(
        f"{meta.file} ends at byte {end}, inside tensor {meta.name!r}, which should reach byte"
        f" {meta.span[1]}. Download it again."
    )


def cannot_be_read(meta: TensorMeta, error: OSError) -> UnreadableError:
    """What to say of a tensor at which the system failed."""
    return UnreadableError(f"{meta.file}: tensor {meta.name!r}: {error.strerror}")
