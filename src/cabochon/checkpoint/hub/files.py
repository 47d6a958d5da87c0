"""Which files of a repository make up a model. Nothing else is fetched: no code, no pickles."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from cabochon.checkpoint.folder import INDEX, SINGLE, weight_map
from cabochon.checkpoint.hub.client import HubError, Listing, Remote, some

CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "recipe.yaml",
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
)
# Beside these, to run it.
SMALL = (
    *CONFIGS,
    "tokenizer.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
MAX_SMALL = 100_000_000

_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_PROJECTOR = re.compile(r"(^|[^a-z])mmproj", re.IGNORECASE)
_EXACTEST = ("f32", "bf16", "f16")  # projectors, by what their names say


def weights(listing: Listing, folder: Path) -> list[str]:
    """Names of the files with the tensors of the model; its index, if any, lies in `folder`.

    Raises:
        HubError: there are none, or several models.
    """
    file, base = listing.id.file, listing.base
    if file is not None and not file.endswith(".gguf"):
        return [file]
    if file is None and base + INDEX in listing.files:
        names = sorted(set(weight_map(folder / INDEX).values()))
        for name in names:
            if name not in listing.files:
                raise HubError(f"{listing}: {INDEX} names {name}, which is not there")
        return names
    if file is None and SINGLE in listing.files:
        return [SINGLE]
    return _gguf(listing)


def checked_size(file: Remote, listing: Listing) -> int:
    """Bytes of a file that is read as a whole. HubError if they are too many for what it is."""
    if file.size > MAX_SMALL:
        raise HubError(
            f"{listing}: {file.name} has {file.size} bytes, at most {MAX_SMALL} are read"
        )
    return file.size


def _gguf(listing: Listing) -> list[str]:
    inside = [
        name
        for name in sorted(listing.files)
        if name.endswith(".gguf") and str(PurePosixPath(name).parent) + "/" in (listing.base, "./")
    ]
    projectors = [name for name in inside if _PROJECTOR.search(PurePosixPath(name).name)]
    models = [name for name in inside if name not in projectors]
    first = [name for name in models if not _PART.fullmatch(name) or "-00001-of-" in name]
    chosen = [listing.id.file] if listing.id.file else first
    if not chosen:
        raise HubError(
            f"{listing} has neither {SINGLE} nor {INDEX} nor a model in GGUF; it has"
            f" {some(listing.files)}"
        )
    if len(chosen) > 1:
        raise HubError(
            f"{listing} holds several models in GGUF: say which, as {listing.id.repo}/FILE."
            f" They are {', '.join(first)}"
        )
    return [*_parts(chosen[0], models), *_projector(projectors)]


def _parts(name: str, models: list[str]) -> list[str]:
    part = _PART.fullmatch(name)
    if part is None:
        return [name]
    return [m for m in models if (p := _PART.fullmatch(m)) and p.groups() == part.groups()]


def _projector(names: list[str]) -> list[str]:
    """The one with the most exact numbers."""
    for kind in _EXACTEST:
        for name in names:
            if re.search(rf"(^|[^a-z]){kind}", PurePosixPath(name).name, re.IGNORECASE):
                return [name]
    return names[:1]
