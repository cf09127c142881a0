"""The HTTP interface, as an ASGI application: predictions, models, health, metrics and documentation."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response

from mopefuse import __version__
from mopefuse.core.error_codes import RequestCode
from mopefuse.errors import MopefuseError, RequestError
from mopefuse.serving.batching import Predictor, Served
from mopefuse.serving.body import read_body, read_form
from mopefuse.serving.catalogue import Catalogue
from mopefuse.serving.middleware import EveryRequest, Record, log_line, record_of
from mopefuse.serving.parse import Body, Row, parse_form, parse_json
from mopefuse.serving.responses import error_body, error_response, json_response, status_of
from mopefuse.serving.server_settings import ServerSettings

_GONE = 499  # the status in the log for a client that did not wait; it never gets a response
_LARGE = 200_000  # bytes of a body that is parsed by a thread, so that other requests do not wait

T = TypeVar("T")


class Service:
    """What the routes share.

    Attributes:
        draining: whether the server is about to end, and takes no more requests.
    """

    def __init__(self, catalogue: Catalogue, predictor: Predictor, settings: ServerSettings) -> None:
        self.catalogue, self.predictor, self.settings = catalogue, predictor, settings
        self.draining = False
        self._held = 0

    async def predict(self, request: Request) -> Response:
        """Answer ``POST /predict``.

        Raises:
            MopefuseError: the request cannot be answered as a whole.
        """
        if self.draining:
            fix = "send it again, to another server or when this one is back"
            raise RequestError(RequestCode.SHUTTING_DOWN, "the server is shutting down", fix=fix)
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            if self._held + size > self.settings.queue_bytes:
                what = f"the requests that are waiting hold {self.settings.queue_mb:g} MB"
                fix = "send it again later, or start the server with more --workers"
                raise RequestError(RequestCode.QUEUE_FULL, what, fix=fix)
            held += size
            self._held += size

        try:
            body = await self._parse(request, hold)
            return await self._answer(request, body)
        finally:
            self._held -= held

    async def _parse(self, request: Request, hold: Callable[[int], None]) -> Body:
        settings = self.settings
        content = await read_body(request, limit=settings.max_body, timeout=settings.read_timeout, hold=hold)
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return parse_form(await read_form(request, content), self._resolve)
        if len(content) > _LARGE:
            return await asyncio.to_thread(parse_json, content, self._resolve, max_rows=settings.max_rows)
        return parse_json(content, self._resolve, max_rows=settings.max_rows)

    def _resolve(self, name: str | None) -> str:
        return self.catalogue.find(name).name

    async def _answer(self, request: Request, body: Body) -> Response:
        wanted = [row.request for row in body.rows if row.request is not None]
        record = record_of(request.scope)
        record.rows, record.models = len(body.rows), sorted({one.model for one in wanted})
        served = iter(await _while_connected(request, self.predictor.predict(wanted)) if wanted else [])
        found = [next(served) if row.request is not None else _unserved(row) for row in body.rows]
        record.queued, record.batch = max(one.queued for one in found), max(one.batch for one in found)
        if body.single and isinstance(found[0].answer, MopefuseError):
            raise found[0].answer
        answers = [_prediction(row, one) for row, one in zip(body.rows, found, strict=True)]
        return json_response(answers[0] if body.single else {"predictions": answers})

    def headers_for(self, error: MopefuseError) -> dict[str, str]:
        """Headers of the response to an error."""
        if error.code == RequestCode.QUEUE_FULL.text:
            return {"Retry-After": str(self.predictor.retry_after())}
        if error.code == RequestCode.SHUTTING_DOWN.text:
            return {"Retry-After": "5", "Connection": "close"}
        return {"Connection": "close"} if error.code in _UNREAD else {}


_UNREAD = (RequestCode.BODY_TOO_LARGE.text, RequestCode.BODY_INCOMPLETE.text)
"""Errors after which the rest of a body is not read."""


def _unserved(row: Row) -> Served:
    assert row.error is not None
    return Served(row.error, 0.0, 0)


def _prediction(row: Row, served: Served) -> dict[str, Any]:
    named = {} if row.id is None else {"id": row.id}
    if isinstance(served.answer, MopefuseError):
        return {**named, "error": error_body(served.answer)}
    assert row.request is not None
    return {"model": row.request.model, **named, **served.answer}


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, unless the client disconnects.

    Raises:
        ClientDisconnect: it did; the work was cancelled.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # the body was read, so this is the end of the connection
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


def create_app(
    catalogue: Catalogue,
    predictor: Predictor,
    settings: ServerSettings,
    log: Callable[[Record], None] | None = None,
) -> FastAPI:
    """The application.

    Args:
        predictor: computes the answers, such as a `mopefuse.serving.batching.Batcher`.
        log: takes the record of each request; by default a line on stderr.
    """
    service = Service(catalogue, predictor, settings)
    app = FastAPI(title="mopefuse", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    _add_routes(app, service)
    app.add_exception_handler(MopefuseError, _on_error(service))
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(EveryRequest, key=settings.api_key, log=log or _log_to_stderr(settings.log_format))
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/predict")
    async def predict(request: Request) -> Response:
        """Predict one row, or several."""
        try:
            return await service.predict(request)
        except ClientDisconnect:
            return Response(status_code=_GONE)

    @app.get("/models")
    async def models() -> Response:
        """The models that are served."""
        return json_response({"models": [_facts(entry) for entry in service.catalogue.entries().values()]})

    @app.get("/models/{name:path}")
    async def model(name: str) -> Response:
        """One model: its task, labels and modalities."""
        return json_response(service.catalogue.find(name).facts)

    @app.get("/health")
    async def health() -> Response:
        """Whether the process lives."""
        return json_response({"status": "alive", "version": __version__})

    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are taken."""
        is_ready = service.predictor.is_ready() and not service.draining
        status = "ready" if is_ready else "draining" if service.draining else "loading"
        return json_response({"status": status}, 200 if is_ready else 503)

    @app.get("/", include_in_schema=False)
    async def home() -> Response:
        return RedirectResponse("/docs")


def _facts(entry: Any) -> dict[str, Any]:
    """The facts of a model; of one that cannot be read, its name."""
    try:
        facts: dict[str, Any] = entry.facts
    except MopefuseError as error:
        return {"name": entry.name, "error": error_body(error)}
    return facts


def _on_error(service: Service) -> Callable[[Request, Exception], Coroutine[Any, Any, Response]]:
    async def respond(request: Request, error: Exception) -> Response:
        assert isinstance(error, MopefuseError)
        record = record_of(request.scope)
        record.error = error.code
        if status_of(error) >= 500:
            print(f"request {record.id}: error[{error.code}]: {error}", file=sys.stderr)
        return error_response(error, record.id, service.headers_for(error))

    return respond


async def _on_http_error(request: Request, error: Exception) -> Response:
    """The response of an unknown path, or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    record = record_of(request.scope)
    known: Sequence[str] = ("POST /predict", "GET /models", "GET /health", "GET /ready", "GET /metrics", "GET /docs")
    what = f"{request.method} {request.url.path}: {error.detail}"
    unknown = RequestError(RequestCode.NO_SUCH_ROUTE, what, where="path", fix=f"use one of {', '.join(known)}")
    record.error = unknown.code
    body = {"error": error_body(unknown), "request_id": record.id}
    return json_response(body, error.status_code, dict(error.headers or {}))


def _log_to_stderr(form: str) -> Callable[[Record], None]:
    return lambda record: print(log_line(record, form), file=sys.stderr, flush=True)
