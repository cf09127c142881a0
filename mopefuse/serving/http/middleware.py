"""What happens to every request: its identifier, the key, the log, and errors that nothing else caught."""

from __future__ import annotations

import hmac
import json
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mopefuse.core.error_codes import RequestCode
from mopefuse.core.formatting import visible
from mopefuse.errors import RequestError
from mopefuse.serving.http.responses import error_response

OPEN_PATHS = ("/health", "/ready", "/", "/docs", "/openapi.json")
"""Paths that need no key, besides those below ``/docs/``: they say nothing about the models of a server that has one."""
_NOT_IN_AN_ID = re.compile("[^A-Za-z0-9._:@/+=-]")
_LONGEST_ID = 128


@dataclass
class Record:
    """What the log says of a request.

    Attributes:
        queued: seconds until its batch was started, of several rows the longest. batch: requests of that batch.
    """

    id: str
    method: str
    path: str
    status: int = 0
    seconds: float = 0.0
    models: Sequence[str] = ()
    rows: int = 0
    queued: float = 0.0
    batch: int = 0
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As it is logged."""
        found: dict[str, Any] = {"id": self.id, "method": self.method, "path": self.path, "status": self.status}
        found["ms"] = round(1000 * self.seconds, 2)
        if self.rows:
            found |= {"models": list(self.models), "rows": self.rows, "queue_ms": round(1000 * self.queued, 2)}
            found["batch"] = self.batch
        return found | ({"error": self.error} if self.error else {})


def record_of(scope: Scope) -> Record:
    """The record of the request that is being handled."""
    record: Record = scope["mopefuse"]
    return record


class EveryRequest:
    """ASGI middleware, see the top of this module.

    Args:
        key: what clients have to send; empty for none. log: takes the record of each request when it is done.
    """

    def __init__(self, app: ASGIApp, key: str, log: Callable[[Record], None]) -> None:
        self._app, self._key, self._log = app, key.encode(), log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = scope["mopefuse"] = Record(_request_id(headers), scope["method"], scope["path"])
        began = time.perf_counter()

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = record.id
            await send(message)

        try:
            if self._key and not self._may_pass(scope["path"], headers):
                await self._refuse(record)(scope, receive, send_on)
            else:
                await self._app(scope, receive, send_on)
        except Exception as error:
            if record.status:
                raise
            print(f"request {record.id}:", file=sys.stderr)
            traceback.print_exception(error)
            what, fix = f"internal error: {type(error).__name__}", "please report it, with the log of the server"
            failure = RequestError(RequestCode.SERVER_FAILED, what, fix=fix)
            record.error = failure.code
            await error_response(failure, record.id)(scope, receive, send_on)
        finally:
            record.seconds = time.perf_counter() - began
            self._log(record)

    def _may_pass(self, path: str, headers: Headers) -> bool:
        if path in OPEN_PATHS or path.startswith("/docs/"):
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode("latin-1", "replace"), self._key)

    def _refuse(self, record: Record) -> ASGIApp:
        what, fix = "the key is missing or wrong", "send it as Authorization: Bearer KEY, or as X-API-Key: KEY"
        error = RequestError(RequestCode.BAD_KEY, what, where="Authorization", fix=fix)
        record.error = error.code
        return error_response(error, record.id, {"WWW-Authenticate": 'Bearer realm="mopefuse"', "Connection": "close"})


def _request_id(headers: Headers) -> str:
    given = _NOT_IN_AN_ID.sub("", headers.get("x-request-id", ""))[:_LONGEST_ID]
    return given or uuid.uuid4().hex


def log_line(record: Record, form: str) -> str:
    """The line of the log for a request.

    Args:
        form: "json" or "text".
    """
    found = record.as_dict()
    if form == "json":
        return json.dumps({"time": round(time.time(), 3), **found})
    head = [found.pop("method"), found.pop("path"), str(found.pop("status")), f"{found.pop('ms')} ms"]
    tail = [f"{name}={','.join(value) if isinstance(value, list) else value}" for name, value in found.items()]
    return visible(" ".join([*head, *tail]))
