"""Answers and errors as HTTP responses: statuses, and bodies that do not show files of the server."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from mopefuse.core.error_codes import DataCode, NumericCode, RequestCode, ResourceCode
from mopefuse.core.formatting import json_text
from mopefuse.errors import DataError, MopefuseError, RequestError, ResourceError

_STATUS = {
    RequestCode.NO_SUCH_MODEL: 404,
    RequestCode.MODEL_NOT_NAMED: 422,
    RequestCode.BAD_REQUEST: 400,
    RequestCode.BAD_KEY: 401,
    RequestCode.BODY_TOO_LARGE: 413,
    RequestCode.TOO_MANY_ROWS: 413,
    RequestCode.QUEUE_FULL: 429,
    RequestCode.SHUTTING_DOWN: 503,
    RequestCode.WORKER_LOST: 503,
    RequestCode.TIMED_OUT: 504,
    RequestCode.URLS_NOT_ALLOWED: 403,
    RequestCode.URL_UNREADABLE: 422,
    RequestCode.SERVER_FAILED: 500,
    RequestCode.BODY_INCOMPLETE: 408,
}
_PUBLIC = {ResourceCode.GPU_MEMORY.text, ResourceCode.HOST_MEMORY.text, NumericCode.PREDICTION_NOT_FINITE.text}
"""Errors of the server whose message helps a client, and names no file."""


def status_of(error: MopefuseError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, RequestError):
        return _STATUS.get(RequestCode(error.number), 500)
    if isinstance(error, DataError):
        return 413 if error.code == DataCode.TOO_MANY_PIXELS.text else 422
    return 503 if isinstance(error, ResourceError) else 500


def error_body(error: MopefuseError) -> dict[str, Any]:
    """What clients are told of an error: ``{"code", "message", "where", "hint"}``."""
    body = {"code": error.code, "message": error.what, "where": error.where, "hint": error.fix}
    if isinstance(error, RequestError | DataError):
        return body
    if error.code not in _PUBLIC:
        body["message"] = "the model cannot be used"
    return body | {"where": "", "hint": "send it again later; the log of the server has the details"}


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A body of JSON."""
    return Response(json_text(body, separators=(",", ":")).encode(), status, headers, "application/json")


def error_response(error: MopefuseError, request_id: str, headers: dict[str, str] | None = None) -> Response:
    """The response to a request that failed as a whole."""
    return json_response({"error": error_body(error), "request_id": request_id}, status_of(error), headers)
