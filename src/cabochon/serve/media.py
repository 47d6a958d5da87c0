"""Media that a request names by URL: fetched only where the operator allows it, and then warily.

What a URL means is decided once: the host it names is resolved here, every address it has must be
public, and the connection goes to the address that was looked at, so that no second look-up can
lead elsewhere. Nothing is followed, nothing of the environment is used.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import SplitResult, urlsplit

from cabochon import __version__
from cabochon.errors import RequestError

FETCH_SECONDS = 20.0  # for the whole of it
CONNECT_SECONDS = 5.0
MAX_FETCHED_BYTES = 64 * 2**20
MAX_URL_LENGTH = 4096
MOST_PLACES = 3  # of one host that are tried

Place = tuple[socket.AddressFamily, Any]  # and an address as that family has it

# Visible ASCII without the backslash, which browsers and libraries read differently.
_URL = re.compile(r"https?://[!-\[\]-~]+", re.IGNORECASE)
_GLOBAL = IPv6Network("2000::/3")  # all that is routed; what lies outside is local, or of no use
_PORTS = {"http": 80, "https": 443}


class Fetcher:
    """Fetches from any public host, or from those in `hosts` alone."""

    def __init__(self, hosts: Sequence[str] = (), most: int = MAX_FETCHED_BYTES) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._most = most
        self._tls = ssl.create_default_context()

    def fetch(self, url: str) -> bytes:
        """What is at `url`; called off the event loop.

        Raises:
            RequestError: the address is not one that may be fetched, or what is there did not come
                whole, in time and within the limits.
        """
        parts = _parse(url)
        host = parts.hostname or ""
        if self._hosts and host not in self._hosts:
            raise RequestError(f"media are not fetched from {host!r}; media_hosts lists the hosts")
        try:
            places = _public_places(host, parts.port or _PORTS[parts.scheme])
            with closing(self._connect(parts, places)) as connection:
                return self._read(connection, parts)
        except (OSError, http.client.HTTPException) as error:
            reason = type(error).__name__
            raise RequestError(f"{host!r} did not send the file: {reason}") from None

    def _connect(self, parts: SplitResult, places: Sequence[Place]) -> http.client.HTTPConnection:
        """A connection to one of `places`, whatever the name resolves to by now."""
        raw = _open(places)
        assert parts.hostname is not None
        connection = http.client.HTTPConnection(parts.hostname, parts.port)
        try:
            secure = parts.scheme == "https"
            connection.sock = (
                self._tls.wrap_socket(raw, server_hostname=parts.hostname) if secure else raw
            )
        except OSError:
            raw.close()
            raise
        return connection

    def _read(self, connection: http.client.HTTPConnection, parts: SplitResult) -> bytes:
        # The socket's own limit is for one packet; a trickle would never meet it.
        alarm = threading.Timer(FETCH_SECONDS, _hang_up, (connection.sock,))
        alarm.daemon = True
        alarm.start()
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"user-agent": f"cabochon/{__version__}", "accept-encoding": "identity"}
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                followed = ", and redirects are not followed" if response.status // 100 == 3 else ""
                raise RequestError(
                    f"{parts.hostname!r} answered with status {response.status}{followed}"
                )
            return self._body(response)
        finally:
            alarm.cancel()

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        body = bytearray()
        if response.length is None or response.length <= self._most:
            while chunk := response.read1(2**16):
                body += chunk
                if len(body) > self._most:
                    break
            else:
                if response.length:
                    raise RequestError("the file did not come whole")
                return bytes(body)
        raise RequestError(f"the file is larger than {self._most:,} bytes")


def _parse(url: str) -> SplitResult:
    if len(url) > MAX_URL_LENGTH or not _URL.fullmatch(url):
        raise RequestError("expected a URL of http or https, without blanks and backslashes")
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if it is none
    except ValueError as error:
        raise RequestError(f"the URL is malformed: {error}") from None
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise RequestError("expected a URL with a host, and without a user's name")
    return parts


def _public_places(host: str, port: int) -> list[Place]:
    """Where `host` is, if all of its addresses are public.

    Raises:
        RequestError: one of them leads to a private network, to this machine, or to many.
        OSError: there is none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not all(is_public(str(entry[4][0])) for entry in found):
        raise RequestError(f"{host!r} is not on the public network; nothing is fetched from there")
    return [(entry[0], entry[4]) for entry in found[:MOST_PLACES]]


def _open(places: Sequence[Place]) -> socket.socket:
    """A connection to the first of `places` that takes one."""
    failed = OSError("it has no address")
    for family, address in places:
        raw = socket.socket(family, socket.SOCK_STREAM)
        raw.settimeout(CONNECT_SECONDS)
        try:
            raw.connect(address)
        except OSError as error:
            raw.close()
            failed = error
        else:
            raw.settimeout(FETCH_SECONDS)
            return raw
    raise failed


def is_public(text: str) -> bool:
    """Whether an address is one of the internet, also where another is wrapped into it."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, IPv6Address):
        inner = [address.sixtofour, *(address.teredo or ())]
        if any(wrapped is not None for wrapped in inner) or address not in _GLOBAL:
            return False
    return address.is_global and not address.is_multicast


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        sock.shutdown(socket.SHUT_RDWR)
