"""A model's configuration and headers, fetched into a folder to be inspected: kilobytes of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cabochon.checkpoint.folder import INDEX
from cabochon.checkpoint.gguf import header_length
from cabochon.checkpoint.headers import HEADER_ONLY, MAX_HEADER_BYTES
from cabochon.checkpoint.hub.client import Hub, HubError, Listing
from cabochon.checkpoint.hub.files import CONFIGS, checked_size, weights
from cabochon.errors import UnreadableError

_FIRST = 1 << 17  # bytes of a safetensors file that are asked for first: most headers fit
_FIRST_GGUF = 1 << 23  # with a vocabulary in it
_TOGETHER = 8  # requests at a time


def fetch_headers(hub: Hub, listing: Listing, folder: Path) -> Path:
    """Fetch into `folder` what a plan is made from; the path to inspect, saved headers in it.

    Raises:
        HubError: a file is missing, cut off, or of another length than the hub says.
    """
    for name in (*CONFIGS, INDEX):
        file = listing.files.get(listing.base + name)
        if file is not None:
            content = hub.read(listing, file.name, 0, checked_size(file, listing))
            (folder / name).write_bytes(content)
    names = weights(listing, folder)
    with ThreadPoolExecutor(_TOGETHER) as pool:
        contents = pool.map(lambda name: _header(hub, listing, name, folder), names)
        for name, content in zip(names, contents, strict=True):
            (folder / (Path(name).name + HEADER_ONLY)).write_bytes(content)
    return folder / (Path(listing.id.file).name + HEADER_ONLY) if listing.id.file else folder


def _header(hub: Hub, listing: Listing, name: str, folder: Path) -> bytes:
    """Exactly the bytes of `name` that precede its tensors."""
    if name.endswith(".gguf"):
        return _gguf_header(hub, listing, name, folder)
    size = listing.files[name].size
    content = hub.read(listing, name, 0, min(_FIRST, size))
    end = 8 + int.from_bytes(content[:8], "little")
    if len(content) < 8 or end > min(size, 8 + MAX_HEADER_BYTES):
        raise HubError(
            f"{listing}: {name} has {size} bytes and its header should have {end}: it is damaged,"
            " or no safetensors file"
        )
    if end > len(content):
        content += hub.read(listing, name, len(content), end)
    return content[:end]


def _gguf_header(hub: Hub, listing: Listing, name: str, folder: Path) -> bytes:
    """A header in GGUF does not say how long it is: more is asked for until it is whole."""
    most = min(listing.files[name].size, MAX_HEADER_BYTES)
    begun = folder / f"{Path(name).name}.begun"
    content, wanted = b"", min(_FIRST_GGUF, most)
    while True:
        content += hub.read(listing, name, len(content), wanted)
        begun.write_bytes(content)
        try:
            return content[: header_length(begun)]
        except UnreadableError as error:
            if wanted == most:
                raise HubError(str(error).replace(str(begun), f"{listing}: {name}")) from None
            wanted = min(4 * wanted, most)
        finally:
            begun.unlink()
