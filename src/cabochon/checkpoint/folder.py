"""`Checkpoint`: the tensors of a folder, whichever files they lie in, and their bytes by range."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cabochon.checkpoint.headers import BITS, TensorMeta, read_header
from cabochon.errors import UnreadableError
from cabochon.files import read_json_object

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_TORCH_NAMES: Mapping[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of safetensors whose headers have been read and found sound."""

    folder: Path
    tensors: Mapping[str, TensorMeta]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of `folder/model.safetensors`, or of the shards that its index names.

        The index is honoured, not the directory: other safetensors files in it are not looked at.

        Raises:
            UnreadableError: nothing to read, a file that is damaged, an index that does not agree.
        """
        if not folder.is_dir():
            raise UnreadableError(_not_a_folder(folder))
        single, index = folder / SINGLE, folder / INDEX
        if index.is_file():
            return cls(folder, _read_shards(folder, _weight_map(index)))
        if single.is_file():
            return cls(folder, {meta.name: meta for meta in read_header(single)})
        raise UnreadableError(_nothing_to_read(folder))

    def read(self, name: str) -> Tensor:
        """The tensor `name` in fresh memory. UnreadableError if its file ends early."""
        return read_tensor(self.tensors[name])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the first axis of `name`, in fresh memory."""
        meta = self.tensors[name]
        assert 0 <= start <= stop <= meta.shape[0], (name, start, stop, meta.shape)
        row_bytes = math.prod(meta.shape[1:]) * BITS[meta.dtype] // 8
        return _read(meta, (stop - start, *meta.shape[1:]), meta.span[0] + start * row_bytes)


def read_tensor(meta: TensorMeta) -> Tensor:
    """The tensor that `meta` describes, in fresh memory. UnreadableError if its file ends early."""
    return _read(meta, meta.shape, meta.span[0])


def _not_a_folder(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"{path} is a GGUF file, which this version does not read yet; give safetensors"
    if path.exists():
        return f"{path} is a file; give the folder that holds config.json and {SINGLE}"
    return f"there is no folder {path}"


def _nothing_to_read(folder: Path) -> str:
    suffixes = {path.suffix for path in folder.iterdir()}
    wanted = f"{folder} has neither {SINGLE} nor {INDEX}"
    if ".gguf" in suffixes:
        return f"{wanted}, but a GGUF file, which this version does not read yet"
    if suffixes & {".bin", ".pt", ".pth", ".ckpt"}:
        return (
            f"{wanted}, but pickled weights (.bin, .pt), which are never read because they can run"
            " code. Convert them with transformers: save_pretrained(..., safe_serialization=True)"
        )
    return f"{wanted}, so there are no weights to read"


def _weight_map(index: Path) -> Mapping[str, str]:
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
    if SINGLE not in shards.values() and (index.parent / SINGLE).is_file():
        raise UnreadableError(
            f"{index.parent} has both {SINGLE} and {INDEX}, which does not name it: it is not clear"
            " which of them is the model. Move one of them away."
        )
    return shards


def _plain(name: str) -> bool:
    return name.endswith(".safetensors") and not set(name) & {"/", "\\", "\0"} and name[0] != "."


def _read_shards(folder: Path, weight_map: Mapping[str, str]) -> Mapping[str, TensorMeta]:
    tensors: dict[str, TensorMeta] = {}
    for shard in sorted(set(weight_map.values())):
        path = folder / shard
        if not path.is_file():
            first = next(name for name, file in weight_map.items() if file == shard)
            raise UnreadableError(
                f"{folder / INDEX} names the shard {shard}, which is not there; it should hold"
                f" {first!r}. Download it."
            )
        for meta in read_header(path):
            where = weight_map.get(meta.name)
            if where != shard:
                said = "does not list it" if where is None else f"puts it into {where}"
                raise UnreadableError(f"{path} holds tensor {meta.name!r}, but {INDEX} {said}")
            tensors[meta.name] = meta
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        name = missing[0]
        raise UnreadableError(
            f"{folder / INDEX} puts {len(missing)} tensors where they are not, first {name!r}"
            f" into {weight_map[name]}"
        )
    return tensors


def _read(meta: TensorMeta, shape: tuple[int, ...], start: int) -> Tensor:
    import torch

    flat = torch.empty(math.prod(shape), dtype=getattr(torch, _TORCH_NAMES[meta.dtype]))
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
        raise UnreadableError(f"{meta.file}: tensor {meta.name!r}: {error.strerror}") from None
    if done < len(buffer):
        raise UnreadableError(
            f"{meta.file} ends at byte {start + done}, inside tensor {meta.name!r}, which should"
            f" reach byte {start + len(buffer)}. Download it again."
        )
    return flat.view(shape)
