"""A model in GGUF: one file, or the parts of a split one, and the projector that lies beside it."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cabochon.checkpoint.gguf import MAGIC, GgufFile, Metadata, read_gguf
from cabochon.checkpoint.headers import HEADER_ONLY, TensorMeta
from cabochon.errors import UnreadableError

SUFFIX = ".gguf"
PROJECTOR = "clip"  # the architecture of what llama.cpp calls mmproj
MAX_PARTS = 1000
MAX_READ = 1 << 16  # bytes of a tensor that the configuration needs

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# Floats of a projector, the most exact first, by general.file_type.
_EXACTNESS = (0, 32, 1)


Sizes = Mapping[str, int]  # bytes of a file, by its name


@dataclass(frozen=True, slots=True)
class GgufModel:
    """The headers of a model, and the metadata of the projector that its towers lie in, if any."""

    path: Path
    metadata: Metadata
    projector: Metadata | None
    tensors: Mapping[str, TensorMeta]  # of both
    others: tuple[Path, ...] = ()  # projectors beside it that are of another model, by their width


def is_gguf(path: Path) -> bool:
    """Whether the file `path` is GGUF, by its name or its first bytes."""
    if path.name.endswith((SUFFIX, SUFFIX + HEADER_ONLY)):
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def gguf_in(folder: Path) -> Path | None:
    """The one model in GGUF that lies in `folder`, by its first part; None if there is none.

    Raises:
        UnreadableError: there are several.
    """
    models = []
    for path in _files(folder):
        part = _PART.fullmatch(_name(path))
        if (part is None or int(part[2]) == 1) and not _is_projector(path):
            models.append(path)
    if len(models) > 1:
        names = ", ".join(path.name for path in models)
        raise UnreadableError(f"{folder} holds several models: {names}. Give one of the files.")
    return models[0] if models else None


def open_gguf(path: Path, sizes: Sizes | None = None) -> GgufModel:
    """Read the headers of the model in `path`, of its other parts, and of its projector.

    `sizes`, where known, are those of whole files.

    Raises:
        UnreadableError: a file that is damaged, parts that are missing or do not belong together,
            or a projector instead of a model.
    """
    parts = [_read(part, sizes) for part in _parts(path)]
    metadata = parts[0].metadata
    if metadata.get("general.architecture") == PROJECTOR:
        raise UnreadableError(
            f"{path} is a projector (mmproj): what a model sees and hears with, but no model. Give"
            " the model's own file; a projector beside it is found."
        )
    _check_parts(parts)
    beside = _projectors(path, sizes)
    width = metadata.get(f"{metadata.get('general.architecture')}.embedding_length")
    fitting = [file for file in beside if _width(file) in (None, width)]
    projector = _most_exact(fitting)
    tensors: dict[str, TensorMeta] = {}
    for file in parts if projector is None else (*parts, projector):
        for meta in file.tensors:
            if meta.name in tensors:
                raise UnreadableError(
                    f"{file.path} and {tensors[meta.name].file} both hold tensor {meta.name!r}"
                )
            tensors[meta.name] = meta
    others = tuple(file.path for file in beside if file not in fitting)
    return GgufModel(path, metadata, projector.metadata if projector else None, tensors, others)


def _read(path: Path, sizes: Sizes | None) -> GgufFile:
    return read_gguf(path, (sizes or {}).get(_name(path)))


def _name(path: Path) -> str:
    """The name of the file that `path` is, or is the saved header of."""
    return path.name.removesuffix(HEADER_ONLY)


def _files(folder: Path) -> list[Path]:
    """All GGUF files in `folder`, or in their place their saved headers."""
    saved = folder.glob(f"*{SUFFIX}{HEADER_ONLY}")
    found = [*folder.glob(f"*{SUFFIX}"), *(p for p in saved if not p.with_name(_name(p)).exists())]
    return sorted(found)


def read_floats(meta: TensorMeta) -> tuple[float, ...]:
    """The numbers of a small float32 tensor; none, if it is another, a large one, or elsewhere.

    Raises:
        UnreadableError: the file ends early, or cannot be read.
    """
    if meta.dtype != "F32" or meta.nbytes > MAX_READ or meta.file.suffix == HEADER_ONLY:
        return ()
    try:
        with meta.file.open("rb") as file:
            file.seek(meta.span[0])
            data = file.read(meta.nbytes)
    except OSError as error:
        raise UnreadableError(f"{meta.file} cannot be read: {error.strerror}") from None
    if len(data) < meta.nbytes:
        raise UnreadableError(f"{meta.file} ends inside of tensor {meta.name!r}")
    return struct.unpack(f"<{meta.nbytes // 4}f", data)


def _parts(path: Path) -> Sequence[Path]:
    """All files of the model that `path` is a part of; the first has the metadata."""
    part = _PART.fullmatch(_name(path))
    if part is None:
        return [path]
    stem, count = part[1], int(part[3])
    if not 0 < count <= MAX_PARTS:
        raise UnreadableError(f"{path} says that it is one of {count} parts")
    found = {_name(file): file for file in _files(path.parent)}
    names = [f"{stem}-{n + 1:05}-of-{count:05}{SUFFIX}" for n in range(count)]
    for name in names:
        if name not in found:
            missing = path.with_name(name)
            raise UnreadableError(f"{missing} is not there, one of {count} parts. Download it.")
    return [found[name] for name in names]


def _check_parts(parts: Sequence[GgufFile]) -> None:
    for number, part in enumerate(parts):
        count = part.metadata.get("split.count", 0 if len(parts) == 1 else None)
        place = part.metadata.get("split.no", 0)
        if count not in (len(parts), 0) or place != number or (count == 0 and len(parts) > 1):
            raise UnreadableError(
                f"{part.path} says that it is part {place} of {count}, counted from 0; its name"
                f" and those beside it make it part {number} of {len(parts)}"
            )
    held = sum(len(part.tensors) for part in parts)
    total = parts[0].metadata.get("split.tensors.count", held)
    if total != held:
        raise UnreadableError(
            f"{parts[0].path} says that all parts hold {total} tensors; they hold {held}"
        )


def _projectors(path: Path, sizes: Sizes | None) -> list[GgufFile]:
    """All projectors beside `path`."""
    found = [_read(file, sizes) for file in _files(path.parent) if _is_projector(file)]
    for file in found:
        kind = file.metadata.get("general.architecture")
        if kind != PROJECTOR:
            raise UnreadableError(
                f"{file.path} is named like a projector, but holds {kind!r}, not {PROJECTOR!r}"
            )
    return found


def _most_exact(projectors: Sequence[GgufFile]) -> GgufFile | None:
    """The same projector may lie there in several types of floats.

    Raises:
        UnreadableError: it is not clear which of them is meant.
    """
    ranks = [_rank(file) for file in projectors]
    if len(ranks) > 1 and ranks.count(min(ranks)) > 1:
        names = ", ".join(file.path.name for file in projectors)
        folder = projectors[0].path.parent
        raise UnreadableError(f"{folder} holds several projectors: {names}. Keep one of them.")
    return projectors[ranks.index(min(ranks))] if projectors else None


def _rank(file: GgufFile) -> int:
    kind = file.metadata.get("general.file_type")
    return _EXACTNESS.index(kind) if kind in _EXACTNESS else len(_EXACTNESS)


def _width(file: GgufFile) -> object:
    keys = ("clip.vision.projection_dim", "clip.audio.projection_dim")
    return next((file.metadata[key] for key in keys if key in file.metadata), None)


def _is_projector(path: Path) -> bool:
    """By its name, as everybody names them: other models in the same folder are not opened."""
    return "mmproj" in path.name.lower()
