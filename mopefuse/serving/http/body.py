"""Reading the body of a request: within a size, a time, and the memory that all bodies share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request

from mopefuse.core.error_codes import RequestCode
from mopefuse.errors import RequestError

_SLOWEST = 50_000  # bytes per second that a body has to arrive with, after the first `timeout` seconds
_MOST_FIELDS = 64
_MOST_FILES = 16


async def read_body(request: Request, *, limit: int, timeout: float, hold: Callable[[int], None]) -> bytes:
    """The whole body.

    Args:
        limit: largest size, in bytes, whether the client announces it or not.
        timeout: seconds without a byte, after which the client is given up.
        hold: called with the number of bytes of each piece; may raise an error if all bodies together are too large.

    Raises:
        RequestError: it is too large, or does not arrive. ClientDisconnect: the client is gone.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(limit)
    pieces: list[bytes] = []
    size = 0
    now = asyncio.get_running_loop().time
    began = now()
    with anyio.move_on_after(timeout) as scope:
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece = message.get("body", b"")
            size += len(piece)
            if size > limit:
                raise _too_large(limit)
            hold(len(piece))
            pieces.append(piece)
            if not message.get("more_body", False):
                return b"".join(pieces)
            scope.deadline = min(now() + timeout, began + timeout + size / _SLOWEST)
    what, fix = f"the body stopped after {size:,} bytes", "send it whole, or start the server with a longer --read-timeout"
    raise RequestError(RequestCode.BODY_INCOMPLETE, what, where="body", fix=fix)


async def read_form(request: Request, content: bytes) -> dict[str, str | bytes]:
    """The fields of a body of multipart/form-data; files as their content.

    Raises:
        RequestError: it is not such a form.
    """

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    try:
        form = await Request(request.scope, receive).form(
            max_files=_MOST_FILES, max_fields=_MOST_FIELDS, max_part_size=max(len(content), 1)
        )
        found: dict[str, str | bytes] = {}
        for name, value in form.multi_items():
            if name in found:
                raise _not_a_form(f"the field {name!r} occurs twice")
            found[name] = await value.read() if isinstance(value, UploadFile) else value
        await form.close()
    except (HTTPException, MultiPartException) as error:
        raise _not_a_form(str(getattr(error, "detail", "") or getattr(error, "message", error))) from None
    except (UnicodeDecodeError, KeyError, ValueError):
        raise _not_a_form("a header of a part cannot be read") from None
    if not found:
        raise _not_a_form("there are no fields")
    return found


def _not_a_form(why: str) -> RequestError:
    what, fix = f"the body is not a form of multipart/form-data: {why}", "send it as curl -F image=@FILE -F text=... does"
    return RequestError(RequestCode.BAD_REQUEST, what, where="body", fix=fix)


def _too_large(limit: int) -> RequestError:
    what = f"the body is larger than {limit / 2**20:g} MB"
    fix = "send fewer rows or smaller files, or start the server with a larger --max-body-mb"
    return RequestError(RequestCode.BODY_TOO_LARGE, what, where="body", fix=fix)
