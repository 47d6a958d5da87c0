"""GGUF fixtures, what gguf-py makes of them, and altered copies written by gguf-py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from conftest import FIXTURES
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants
from torch import Tensor

FOLDER = FIXTURES / "gguf"

# A model file, and the folder whose config.json it was converted from.
MODELS: Mapping[str, tuple[Path, Path]] = {
    "e2b q4_1": (FOLDER / "e2b" / "e2b-q4_1.gguf", FIXTURES / "e2b-bf16"),
    "e2b every type": (FOLDER / "e2b-wide" / "e2b-q4_0.gguf", FOLDER / "e2b-wide"),
    "12b every type": (FOLDER / "12b-wide" / "12b-q4_0.gguf", FOLDER / "12b-wide"),
    "12b split": (FOLDER / "12b" / "12b-q8_0-00001-of-00003.gguf", FIXTURES / "12b-bf16"),
    "26b q4_0": (FOLDER / "26b" / "26b-q4_0.gguf", FIXTURES / "26b-bf16"),
    "26b mxfp4": (FOLDER / "26b" / "26b-mxfp4.gguf", FIXTURES / "26b-bf16"),
    "26b nvfp4": (FOLDER / "nvfp4" / "26b-nvfp4.gguf", FOLDER / "nvfp4"),
    "26b every type": (FOLDER / "26b-wide" / "26b-q4_k_m.gguf", FOLDER / "26b-wide"),
    "26b experts": (FOLDER / "26b-experts" / "26b-q4_0.gguf", FOLDER / "26b-experts"),
    "31b every type": (FOLDER / "31b-wide" / "31b-q4_0.gguf", FOLDER / "31b-wide"),
    "31b fused": (FOLDER / "31b" / "31b-q5_0.gguf", FIXTURES / "31b-bf16"),
}

Array = npt.NDArray[Any]


def parts(path: Path) -> list[Path]:
    """All files of the model in `path`."""
    stem, split, count = path.name.partition("-00001-of-")
    return sorted(path.parent.glob(f"{stem}-*-of-{count}")) if split else [path]


def decoded(path: Path) -> dict[str, Tensor]:
    """Every tensor as gguf-py decodes it, in float32, by llama.cpp's names."""
    return {
        tensor.name: torch.from_numpy(
            np.array(quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        )
        for part in parts(path)
        for tensor in GGUFReader(part).tensors
    }


def text_weights(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text model of `path` under upstream's names, of which `wanted` are to be found.

    Names are translated by gguf-py's own table.
    """
    stored = decoded(path)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, 99)
    found = {}
    for name, like in wanted.items():
        if "language_model" not in name:
            continue
        found[name] = _text_weight(name, like, stored, table).reshape(like.shape)
    return found


def _text_weight(name: str, like: Tensor, stored: Mapping[str, Tensor], table: Any) -> Tensor:
    plain = name.replace("model.language_model.", "model.")
    layer = plain.split(".")[2]
    if plain.endswith("router.scale"):
        return stored[f"blk.{layer}.ffn_gate_inp.scale"]
    if plain.endswith("per_expert_scale"):
        return stored[f"blk.{layer}.ffn_down_exps.scale"]
    if plain.endswith(("layer_scalar", "experts.gate_up_proj", "experts.down_proj")):
        plain += ".weight"
    theirs = table.get_name(plain, try_suffixes=(".weight",))
    assert theirs is not None, name
    if theirs in stored:
        weight = stored[theirs]
        scale = stored.get(theirs.removesuffix("weight") + "scale")
        # Of the experts' last matrix and of the router it is a parameter of its own.
        own = scale is None or "down_exps" in theirs or "gate_inp" in theirs
        return weight if own else weight * scale
    if "gate_up_exps" in theirs:
        halves = []
        for part in ("gate", "up"):
            half = stored[f"blk.{layer}.ffn_{part}_exps.weight"]
            scale = stored.get(f"blk.{layer}.ffn_{part}_exps.scale", torch.ones(len(half)))
            halves.append(half * scale[:, None, None])
        return torch.cat(halves, dim=1)
    fused = stored[f"blk.{layer}.attn_qkv.weight"]
    rows = len(like)
    start = {"q": 0, "v": len(fused) - rows}.get(plain.split(".")[4][0], len(fused) - 2 * rows)
    return fused[start : start + rows]


Fields = dict[str, tuple[GGUFValueType, GGUFValueType | None, Any]]  # type, of entries, value
Tensors = dict[str, tuple[Array, GGMLQuantizationType]]  # bytes or floats, as gguf-py has them


def rewrite(
    source: Path,
    target: Path,
    tensors: Callable[[Tensors], object] | None = None,
    fields: Callable[[Fields], object] | None = None,
) -> Path:
    """A copy of one file after its tensors and metadata were changed in place."""
    reader = GGUFReader(source)
    stored: Tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    described: Fields = dict(_fields(reader))
    if tensors is not None:
        tensors(stored)
    if fields is not None:
        fields(described)
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(target, str(described["general.architecture"][2]))
    for key, (kind, of, value) in described.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, kind, of)
    for name, (data, tensor_type) in stored.items():
        writer.add_tensor(name, data, raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _fields(reader: GGUFReader) -> Iterator[tuple[str, tuple[Any, Any, Any]]]:
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            kind, *of = field.types
            yield key, (kind, of[-1] if of else None, field.contents())
