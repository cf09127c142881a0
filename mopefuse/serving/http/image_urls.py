"""Files that a request names by URL, from hosts that the operator allowed.

A host is resolved once, its address is checked, and the connection goes to that address, so that a name cannot mean a public
address when it is checked and a private one when it is used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

import anyio
import httpx

from mopefuse.core.error_codes import RequestCode
from mopefuse.errors import RequestError

_REDIRECTS = 3
_PORTS = {"https": 443, "http": 80}
_LOCAL_NAME = "localhost"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class UrlReader:
    """Reads files by URL.

    Args:
        allowed: hosts, as in ``images.example.com``, ``127.0.0.1:9000`` or ``[::1]``; without a port that of the scheme.
        limit: largest file, in bytes. timeout: seconds for one file.
    """

    def __init__(self, allowed: Sequence[str], *, limit: int, timeout: float) -> None:
        self._allowed = {_host_and_port(host) for host in allowed}
        self._limit, self._timeout = limit, timeout

    async def read(self, url: str, where: str, hold: Callable[[int], None]) -> bytes:
        """The content of a file.

        Args:
            where: the field of the request. hold: called with the number of bytes of each piece.

        Raises:
            RequestError: its host is not allowed, or it cannot be read.
        """
        if not self._allowed:
            what, fix = "this server reads no URLs", "send the file in base64, or start the server with --allow-urls HOST"
            raise RequestError(RequestCode.URLS_NOT_ALLOWED, what, where=where, fix=fix)
        try:
            with anyio.fail_after(self._timeout):
                return await self._follow(url, where, hold)
        except TimeoutError:
            raise _unreadable(f"was not read within {self._timeout:g} seconds", where) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            raise _unreadable(f"cannot be read: {type(error).__name__}", where) from None

    async def _follow(self, url: str, where: str, hold: Callable[[int], None]) -> bytes:
        first = self._check(url, where)
        for _ in range(_REDIRECTS + 1):
            parts = self._check(url, where)
            if parts.hostname != first.hostname:
                raise _unreadable("redirects to another host", where)
            address = await self._resolve(parts, where)
            location, content = await self._get(parts, address, where, hold)
            if location is None:
                return content
            url = urljoin(url, location)
        raise _unreadable("redirects too often", where)

    def _check(self, url: str, where: str) -> SplitResult:
        """The parts of an allowed URL."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0)
        except ValueError:
            raise _unreadable("is not a URL", where) from None
        if not host or parts.scheme not in _PORTS or parts.username is not None:
            raise _unreadable("is not a URL of https without a user name", where)
        named = (host, port) in self._allowed or ((host, 0) in self._allowed and parts.port in (None, _PORTS[parts.scheme]))
        if not named:
            what, fix = f"URLs of {host}{f':{parts.port}' if parts.port else ''} are not allowed", "send the file in base64"
            raise RequestError(RequestCode.URLS_NOT_ALLOWED, what, where=where, fix=fix)
        if parts.scheme == "http" and not _is_loopback(host):
            raise RequestError(RequestCode.URLS_NOT_ALLOWED, "URLs of http are not allowed", where=where, fix="use https")
        return parts

    async def _resolve(self, parts: SplitResult, where: str) -> str:
        """The address to connect to."""
        host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        address = ipaddress.ip_address(found[0][4][0])
        is_named = _is_loopback(host) or any(str(address) == name for name, _ in self._allowed)
        if not is_named and not _is_public(address):
            what = f"{host} has a private address"
            fix = "start the server with --allow-urls for that address as well"
            raise RequestError(RequestCode.URLS_NOT_ALLOWED, what, where=where, fix=fix)
        return str(address)

    async def _get(
        self, parts: SplitResult, address: str, where: str, hold: Callable[[int], None]
    ) -> tuple[str | None, bytes]:
        """Where a redirect leads, or None and the content."""
        url = httpx.URL(parts.geturl())
        headers = {"Host": url.netloc.decode(), "Accept-Encoding": "identity"}
        extensions = {"sni_hostname": parts.hostname}
        async with (
            httpx.AsyncClient(trust_env=False, timeout=self._timeout) as client,
            client.stream("GET", url.copy_with(host=address), headers=headers, extensions=extensions) as response,
        ):
            if response.is_redirect:
                return response.headers["location"], b""
            if response.status_code != 200:
                raise _unreadable(f"was answered with status {response.status_code}", where)
            pieces, size = [], 0
            async for piece in response.aiter_raw():
                size += len(piece)
                if size > self._limit:
                    raise _unreadable(f"is larger than {self._limit / 2**20:g} MB", where)
                hold(len(piece))
                pieces.append(piece)
        return None, b"".join(pieces)


def _host_and_port(text: str) -> tuple[str, int]:
    """The parts of ``HOST`` or ``HOST:PORT``; 0 for no port.

    Raises:
        RequestError: it is neither.
    """
    try:
        parts = urlsplit(f"//{text}")
        if parts.hostname and parts.netloc == text and "@" not in text:
            return parts.hostname, parts.port or 0
    except ValueError:
        pass
    what, fix = f"{text!r} is not a host", "write a name or an address, as in images.example.com or 127.0.0.1:9000"
    raise RequestError(RequestCode.URLS_NOT_ALLOWED, what, where="--allow-urls", fix=fix)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == _LOCAL_NAME


def _is_public(address: Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_global and not address.is_multicast


def _unreadable(why: str, where: str) -> RequestError:
    return RequestError(RequestCode.URL_UNREADABLE, f"the URL {why}", where=where, fix="send the file in base64")
