"""The connection of a client to a server: sends requests again where that helps, and explains what fails."""

from __future__ import annotations

import random
import time
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from itertools import count

import httpx

from mopefuse.core.error_codes import RequestCode
from mopefuse.errors import RequestError

_BUSY = (429, 503)
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 60.0  # seconds before a request is sent again
_LOST = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)
"""The connection failed before a response."""


class Connection:
    """Connections to one server; several threads may share it.

    Args:
        url, timeout, retries: see `mopefuse.serving.client.Client`. key: the server's key; empty for none.

    Raises:
        RequestError: `url` is not an address, or `key` cannot be sent.
    """

    def __init__(self, url: str, key: str, timeout: float, retries: int) -> None:
        self.url, self._timeout, self._retries = _address(url), timeout, retries
        if not key.isascii() or (key and not key.isprintable()):
            what, fix = "the key has characters that cannot be sent", "pass the key that the server was started with"
            raise RequestError(RequestCode.BAD_KEY, what, where="api_key", fix=fix)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # More threads than connections wait for each other, which is not the server's fault and has no limit.
        self._http = httpx.Client(headers=headers, timeout=httpx.Timeout(timeout, pool=None))

    def send(self, method: str, path: str, body: bytes | None = None) -> httpx.Response:
        """The response to a request, which is sent again if the server is busy or the connection fails.

        Args:
            body: JSON.

        Raises:
            RequestError: there is no response.
        """
        headers = {} if body is None else {"Content-Type": "application/json"}
        for attempt in count():
            wait = _FIRST_WAIT * 2**attempt * random.uniform(0.75, 1.25)
            try:
                response = self._http.request(method, self.url + path, content=body, headers=headers)
            except httpx.TransportError as error:
                if not isinstance(error, _LOST) or attempt >= self._retries:
                    raise self._failure(error) from error
            else:
                if response.status_code not in _BUSY or attempt >= self._retries:
                    return response
                asked = _retry_after(response)
                wait = wait if asked is None else asked
            time.sleep(wait)
        raise AssertionError("there is no last attempt")

    def is_ready(self) -> bool:
        """Whether the server can be reached and takes requests."""
        try:
            return self._http.get(f"{self.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def _failure(self, error: httpx.TransportError) -> RequestError:
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            what = f"no answer within {self._timeout:g} seconds"
            fix = "pass a longer timeout, or start the server with more workers"
            return RequestError(RequestCode.TIMED_OUT, what, where=self.url, fix=fix)
        what = f"the server cannot be reached: {str(error) or type(error).__name__}"
        fix = "start it with mopefuse serve, or correct the address"
        return RequestError(RequestCode.SERVER_UNREACHABLE, what, where=self.url, fix=fix)


def _address(url: str) -> str:
    """The address without a slash at its end.

    Raises:
        RequestError: it is not one of http or https.
    """
    try:
        parsed = httpx.URL(url)
        if parsed.scheme in ("http", "https") and parsed.host:
            return str(url).rstrip("/")
    except (httpx.InvalidURL, TypeError):
        pass
    what, fix = f"{url!r} is not the address of a server", "pass one such as http://127.0.0.1:8000"
    raise RequestError(RequestCode.SERVER_UNREACHABLE, what, where="url", fix=fix)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds until a request may be sent again, as seconds or a date of the header Retry-After; None without one."""
    header = response.headers.get("retry-after", "")
    try:
        now = datetime.now(timezone.utc)
        seconds = float(header) if header.isdigit() else (parsedate_to_datetime(header) - now).total_seconds()
    except (TypeError, ValueError):
        return None
    return min(max(seconds, 0.0), _LONGEST_WAIT)
