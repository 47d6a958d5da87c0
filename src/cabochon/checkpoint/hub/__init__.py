"""Models on the Hugging Face hub: headers by range requests, whole files with resume and hashes.

All requests go through huggingface-hub, with its cache, its tokens (`HF_TOKEN`, or a login) and its
settings (`HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE`). Two things are ours. A file that was begun is
continued by the next process too; the library continues within one only. And what was downloaded is
held against the size and the SHA-256 that the hub states before it is used.
"""

from cabochon.checkpoint.hub.client import Hub, HubError, Listing
from cabochon.checkpoint.hub.downloads import download
from cabochon.checkpoint.hub.headers import fetch_headers

__all__ = ["Hub", "HubError", "Listing", "download", "fetch_headers"]
