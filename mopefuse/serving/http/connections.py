"""Connections of clients: closed if they do not send a whole request in time, and counted.

uvicorn waits for ever for the first byte, the rest of the headers, and the rest of a body that was refused.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from mopefuse.core.error_codes import RequestCode
from mopefuse.errors import RequestError
from mopefuse.serving.http.responses import error_body, status_of

_LONGEST_HEADERS = 1 << 16


def make_protocol(timeout: float, most: int) -> type[asyncio.Protocol]:
    """The protocol of a connection, for uvicorn.

    Args:
        timeout: seconds from the connection, or from the first byte of a further request, to the end of the headers.
        most: open connections; further ones are refused. 0 for no limit.
    """
    base: Any = AutoHTTPProtocol

    class Connection(base):  # type: ignore[misc]
        """One connection of a client."""

        _timer: asyncio.TimerHandle | None = None
        _unused = 0  # bytes that did not become a request

        def connection_made(self, transport: asyncio.Transport) -> None:
            """See `asyncio.Protocol`."""
            super().connection_made(transport)
            if most and len(self.connections) > most:
                transport.write(_too_many(most))
                transport.close()
                return
            self._expect()

        def data_received(self, data: bytes) -> None:
            """See `asyncio.Protocol`."""
            super().data_received(data)
            if self._is_busy():
                self._unused = 0
                self._stop_waiting()
                return
            self._expect()
            self._unused += len(data)
            if self.cycle is None and self._unused > _LONGEST_HEADERS:
                self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            """See `asyncio.Protocol`."""
            self._stop_waiting()
            super().connection_lost(exc)

        def _is_busy(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _expect(self) -> None:
            """Close the connection, unless a request begins in time."""
            if self._timer is None and not self.transport.is_closing():
                self._timer = self.loop.call_later(timeout, self._close)

        def _stop_waiting(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close(self) -> None:
            self._timer = None
            if not self._is_busy():
                self.transport.close()

    return Connection


def _too_many(most: int) -> bytes:
    what = f"{most} connections are open, and more are not allowed"
    fix = "send it again later, or start the server with a larger --max-connections"
    error = RequestError(RequestCode.QUEUE_FULL, what, fix=fix)
    body = json.dumps({"error": error_body(error), "request_id": ""}).encode()
    head = f"HTTP/1.1 {status_of(error)} Too Many Requests\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    return f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
