"""From what a user calls a model to a checkpoint on this machine, or to a report on one.

What a hub id names is inspected before it is downloaded: a refusal costs kilobytes, not gigabytes.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from cabochon.checkpoint.hub import Hub, HubError, Listing, download, fetch_headers
from cabochon.checkpoint.source import HubId, Source, hub_id
from cabochon.errors import LoadError, UnreadableError
from cabochon.files import DEMO
from cabochon.load.report import Report, inspect_checkpoint

DEMO_NAME = "cabochon-demo"

logger = logging.getLogger(__name__)


def inspect_model(
    model: str | Path | None = None, *, weights_only: bool = False, hub: Hub | None = None
) -> Report:
    """The report on a path, on a hub id by its headers alone, or on the demo.

    Raises:
        UnreadableError: there is no checkpoint that could be judged.
        HubError: the hub does not give it.
    """
    id = None if model is None else hub_id(model)
    if id is None:
        return inspect_checkpoint(DEMO if model is None else Path(model), weights_only=weights_only)
    hub = hub or Hub()
    if hub.offline:
        return inspect_checkpoint(_downloaded(hub, id), weights_only=weights_only, source=str(id))
    return _inspect_remote(hub, hub.listing(id), weights_only=weights_only)


def obtain(
    model: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    weights_only: bool = False,
    hub: Hub | None = None,
) -> Source:
    """Where `model` lies on this machine; what a hub id names is downloaded if it would load.

    Args:
        model: a path, a hub id, or None for the demo.
        progress: called with bytes done and bytes in all of a download.
        weights_only: judge it without what a recipe does to activations.
        hub: the one to ask; without it that of the environment.

    Raises:
        LoadError: it would not load; nothing is downloaded.
        HubError: the hub does not give it.
        ResourceError: the disk is too small.
    """
    if model is None:
        return Source(DEMO, DEMO_NAME, str(DEMO))
    id = hub_id(model)
    if id is None:
        path = Path(model)
        return Source(path, path.resolve().name.removesuffix(".gguf"), str(model))
    hub = hub or Hub()
    if hub.offline:
        return Source(_downloaded(hub, id), str(id), str(id))
    listing = hub.listing(id)
    report = _inspect_remote(hub, listing, weights_only=weights_only)
    if not report.loads:
        raise LoadError(report.text())
    logger.info("%s, of %s", listing, hub.endpoint)
    return Source(download(hub, listing, progress), str(id), str(listing))


def _inspect_remote(hub: Hub, listing: Listing, *, weights_only: bool) -> Report:
    with tempfile.TemporaryDirectory(prefix="cabochon-") as folder:
        path = fetch_headers(hub, listing, Path(folder))
        try:
            return inspect_checkpoint(
                path, weights_only=weights_only, source=str(listing), sizes=listing.sizes
            )
        except UnreadableError as error:  # names files where they lay for a moment
            raise type(error)(str(error).replace(folder, str(listing))) from None


def _downloaded(hub: Hub, id: HubId) -> Path:
    found = hub.downloaded(id)
    if found is None:
        raise HubError(
            f"{id} is not among what was downloaded to {hub.cache}, and HF_HUB_OFFLINE keeps from"
            " asking the hub. If a folder is meant, there is none of that name."
        )
    return found
