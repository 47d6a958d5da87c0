"""Downloads of what loading reads: continued where they were cut off, and checked at their end."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from shutil import disk_usage
from typing import IO, Any

from cabochon.checkpoint.folder import INDEX
from cabochon.checkpoint.hub.client import Hub, HubError, Listing, Remote
from cabochon.checkpoint.hub.files import SMALL, checked_size, weights
from cabochon.errors import ResourceError

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Step = Callable[[int], None]  # bytes of one file

_CHUNK = 1 << 22  # bytes that are hashed at a time

logger = logging.getLogger(__name__)


def download(hub: Hub, listing: Listing, progress: Progress | None = None) -> Path:
    """What loading reads of a model, in the cache: its folder, or the one file that was named.

    Files that are there already are not asked for again. What a process that was ended has left
    behind is continued.

    Raises:
        HubError: a file is missing or cut off, or is not what the hub says it is.
        ResourceError: the disk is too small.
    """
    repository = hub.repository(listing.id)
    snapshot = repository / "snapshots" / listing.commit
    for name in (*SMALL, INDEX):
        file = listing.files.get(listing.base + name)
        if file is not None:
            checked_size(file, listing)
            _by_library(hub, listing, file)
    large = [listing.files[name] for name in weights(listing, snapshot / listing.base)]
    _check_room(hub, listing, repository, large)
    done, total = 0, sum(file.size for file in large)
    for file in large:

        def step(more: int, done: int = done) -> None:
            if progress is not None:
                progress(done + more, total)

        _weights(hub, listing, repository, file, step)
        done += file.size
        step(file.size)
    _remember(listing, repository)
    return snapshot / (listing.id.file or "")


def _weights(hub: Hub, listing: Listing, repository: Path, file: Remote, step: Step) -> None:
    """Put a large file into the cache, if it is not there, and check its hash."""
    from huggingface_hub import constants

    there = (repository / "snapshots" / listing.commit / file.name).exists()
    # A file so large is given in the library's own protocol only, which checks hashes itself.
    if not there and file.sha256 and file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
        blob = repository / "blobs" / file.sha256
        blob.parent.mkdir(parents=True, exist_ok=True)
        with _begun(blob).open("ab") as out:
            fcntl.flock(out, fcntl.LOCK_EX)  # another process may be at it
            if not blob.exists():
                _continue(hub, listing, file, out, step)
                _check_hash(_begun(blob), listing, file)
                _begun(blob).rename(blob)
            else:
                _begun(blob).unlink(missing_ok=True)
    _by_library(hub, listing, file)


def _begun(blob: Path) -> Path:
    """Where a blob grows; not the library's own name for it, since that has rules of its own."""
    return blob.with_name(f"{blob.name}.begun")


def _continue(hub: Hub, listing: Listing, file: Remote, out: IO[bytes], step: Step) -> None:
    from huggingface_hub.file_download import http_get

    begun = out.seek(0, os.SEEK_END)
    if begun > file.size:
        out.truncate(0)
        begun = 0
    if begun:
        logger.info("%s: %s goes on at byte %d", listing, file.name, begun)
    with hub.told(listing.id):
        try:
            http_get(
                hub.url(listing, file.name),
                _Counted(out, step),  # type: ignore[arg-type]  # of a file it needs these methods
                resume_size=begun,
                headers=hub.headers(),
                expected_size=file.size,
                displayed_filename=file.name,
                tqdm_class=_silent(),
            )
        except OSError as error:
            from huggingface_hub.errors import HfHubHTTPError

            if isinstance(error, HfHubHTTPError):
                raise
            raise HubError(f"{listing}: {file.name}: {error}") from None
    out.flush()
    size = out.seek(0, os.SEEK_END)
    if size != file.size:
        raise HubError(f"{listing}: {file.name} came with {size} bytes, expected {file.size}")


def _check_hash(path: Path, listing: Listing, file: Remote) -> None:
    """Remove what is not what the hub says: going on with it would never end well."""
    found = hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK):
            found.update(chunk)
    if found.hexdigest() != file.sha256:
        path.unlink()
        raise HubError(
            f"{listing}: {file.name} has SHA-256 {found.hexdigest()}, the hub says {file.sha256}:"
            " it was damaged on the way, and is removed. Download it again."
        )


def _by_library(hub: Hub, listing: Listing, file: Remote) -> None:
    """A file of the cache; what is there is not asked for, a blob that is there is linked."""
    from huggingface_hub import hf_hub_download

    with hub.told(listing.id):
        path = Path(
            hf_hub_download(
                listing.id.repo,
                file.name,
                revision=listing.commit,
                cache_dir=hub.cache,
                token=hub.token,
                endpoint=hub.endpoint,
                tqdm_class=_silent(),
            )
        )
    size = path.stat().st_size
    if size != file.size:
        raise HubError(
            f"{path} has {size} bytes, the hub says {file.size}. Remove it and download it again."
        )


def _check_room(hub: Hub, listing: Listing, repository: Path, files: list[Remote]) -> None:
    missing = 0
    for file in files:
        blob = repository / "blobs" / (file.sha256 or file.name)
        there = next((p.stat().st_size for p in (blob, _begun(blob)) if p.exists()), 0)
        missing += max(0, file.size - there)
    hub.cache.mkdir(parents=True, exist_ok=True)
    free = disk_usage(hub.cache).free
    if missing > free:
        raise ResourceError(
            f"{listing} needs {missing / 1e9:.2f} GB more in {hub.cache}, where {free / 1e9:.2f} GB"
            " are free; HF_HOME chooses another place"
        )


def _remember(listing: Listing, repository: Path) -> None:
    """Which commit a branch was at, for use without a connection."""
    revision = listing.id.revision or "main"
    if revision != listing.commit:
        ref = repository / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(listing.commit)


class _Counted:
    """A file that tells how far it is, as far as `http_get` needs one."""

    def __init__(self, file: IO[bytes], step: Step) -> None:
        self._file = file
        self._step = step

    def write(self, data: bytes) -> int:
        count = self._file.write(data)
        self._step(self._file.tell())
        return count

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def truncate(self) -> int:
        return self._file.truncate()


def _silent() -> type[Any]:
    """A progress bar that shows nothing: there is one over all files."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return Silent
