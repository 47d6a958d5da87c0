"""A hub: what a repository holds, pieces of its files, and errors that say what to do."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cabochon.checkpoint.source import HubId
from cabochon.errors import UnreadableError

_TRIES = 4
_SECONDS = 30  # without a byte

logger = logging.getLogger(__name__)


class HubError(UnreadableError):
    """The hub does not give what was asked for."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A file of a repository."""

    name: str
    size: int
    sha256: str | None  # of large files


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit."""

    id: HubId
    commit: str
    files: Mapping[str, Remote]

    def __str__(self) -> str:
        file = f"/{self.id.file}" if self.id.file else ""
        return f"{self.id.repo}{file}@{self.commit[:12]}"

    @property
    def base(self) -> str:
        """The folder in which the model lies, with a slash behind it; nothing for the top."""
        folder = str(PurePosixPath(self.id.file or "").parent)
        return "" if folder == "." else f"{folder}/"

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of all files, by the names that they have in the model's folder."""
        return {name.removeprefix(self.base): file.size for name, file in self.files.items()}


class Hub:
    """A hub and the cache of what was downloaded from it.

    Args:
        endpoint: its address; without it what `HF_ENDPOINT` says, or huggingface.co.
        cache: folder of downloads; without it what `HF_HUB_CACHE` or `HF_HOME` says.
        token: without it `HF_TOKEN`, or that of a login.
    """

    def __init__(
        self, endpoint: str | None = None, cache: Path | None = None, token: str | None = None
    ) -> None:
        from huggingface_hub import HfApi, constants

        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.cache = Path(cache or constants.HF_HUB_CACHE)
        self.offline: bool = constants.HF_HUB_OFFLINE
        self.token = token
        self._api = HfApi(endpoint=self.endpoint, token=token)

    def listing(self, id: HubId) -> Listing:
        """What the repository holds, at the commit that its revision is at now.

        Raises:
            HubError: no such repository or revision, no right to it, or no answer.
        """
        with self.told(id):
            info = self._api.model_info(id.repo, revision=id.revision, files_metadata=True)
        if not info.sha:
            raise HubError(f"{self.endpoint} does not say at which commit {id} is")
        files = {}
        for file in info.siblings or ():
            sha256 = file.lfs.sha256 if file.lfs else None
            files[file.rfilename] = Remote(file.rfilename, file.size or 0, sha256)
        if id.file and id.file not in files:
            raise HubError(f"{id.repo} has no file {id.file}; it has {some(files)}")
        return Listing(id, info.sha, files)

    def downloaded(self, id: HubId) -> Path | None:
        """What was downloaded of `id`, as it was then: a folder of the cache, or a file in it."""
        revision = id.revision or "main"
        ref = self.repository(id) / "refs" / revision
        commit = ref.read_text().strip() if ref.is_file() else revision
        found = self.repository(id) / "snapshots" / commit / (id.file or "")
        return found if found.exists() else None

    def repository(self, id: HubId) -> Path:
        """The folder of the cache that holds what was downloaded of a repository."""
        return self.cache / f"models--{id.repo.replace('/', '--')}"

    def read(self, listing: Listing, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file; a connection that is cut is opened again.

        Raises:
            HubError: there are not so many, whatever the hub says, or it does not give them.
        """
        import httpx2

        content = bytearray()
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(0.2 * 2**attempt)
            with self.told(listing.id):
                try:
                    self._read(listing, name, start, stop, content)
                except (httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
                    logger.info("%s: %s: %s", listing, name, error)
            if len(content) == stop - start:
                return bytes(content)
        raise HubError(
            f"{listing}: {name} was cut off after {start + len(content)} bytes, {_TRIES} times;"
            f" {stop} were asked for, of {listing.files[name].size} that the hub says it has"
        )

    def _read(self, listing: Listing, name: str, start: int, stop: int, content: bytearray) -> None:
        """Append to `content` what one request gives of what is still missing."""
        from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

        first = start + len(content)
        headers = {**self.headers(), "Range": f"bytes={first}-{stop - 1}"}
        url = self.url(listing, name)
        with http_stream_backoff(
            "GET", url, headers=headers, timeout=_SECONDS, retry_on_exceptions=()
        ) as answer:
            hf_raise_for_status(answer)
            _check_length(answer, listing.files[name], listing)
            skip = first if answer.status_code == 200 else 0  # it knows no ranges
            for chunk in answer.iter_raw():
                content += chunk[skip:]
                skip = max(0, skip - len(chunk))
                if len(content) >= stop - start:
                    break
        del content[stop - start :]

    def url(self, listing: Listing, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(listing.id.repo, name, revision=listing.commit, endpoint=self.endpoint)

    def headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        # Offsets are those of the file, not of anything that was compressed on the way.
        return {**build_hf_headers(token=self.token), "Accept-Encoding": "identity"}

    @contextmanager
    def told(self, id: HubId) -> Iterator[None]:
        """Turns what huggingface-hub raises into a `HubError` that says what to do."""
        import httpx2
        from huggingface_hub import errors

        try:
            yield
        except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
            raise HubError(
                f"{id} is not among what was downloaded to {self.cache}, and HF_HUB_OFFLINE keeps"
                " from asking the hub. If a folder is meant, there is none of that name."
            ) from None
        except errors.HfHubHTTPError as error:
            raise HubError(self._refused(id, error)) from None
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise HubError(
                f"{id} is no folder here, and {self.endpoint} cannot be reached: {error}."
                " HF_HUB_OFFLINE=1 uses what was downloaded before."
            ) from None

    def _refused(self, id: HubId, error: Any) -> str:
        """What became of a request, in words for whoever made it."""
        from huggingface_hub import errors

        status = error.response.status_code
        said = f"{id}: {self.endpoint} answers {status}"
        token = "set HF_TOKEN, or log in with `hf auth login`"
        if isinstance(error, errors.GatedRepoError) or status == 403:
            page = f"{self.endpoint}/{id.repo}"
            return f"{said}: accept the conditions at {page}, and {token} of that account"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{said}: the repository has no revision {id.revision!r}"
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return f"{said}: the repository has no file {error.response.url.path}"
        if status in (401, 404):
            return (
                f"{said}: there is no such folder here, and no such repository that this account"
                f" may see. If it is private, {token}."
            )
        if status == 429:
            wait = error.response.headers.get("Retry-After")
            after = f" after {wait} seconds" if wait else " later"
            return f"{said}: too many requests. Try again{after}; with a token there may be more."
        return f"{said}: {str(error).strip().splitlines()[0]}"


def some(names: Mapping[str, Any]) -> str:
    """A few of `names`, for a message."""
    shown = sorted(names)[:8]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _check_length(answer: Any, file: Remote, listing: Listing) -> None:
    """The answer says how long the file is; the listing said so too."""
    if answer.status_code == 206:
        said = answer.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        said = answer.headers.get("Content-Length", "")
    if said.isdecimal() and int(said) != file.size:
        raise HubError(
            f"{listing}: {file.name} has {said} bytes, the hub's listing says {file.size}"
        )
