"""The HTTP interface, as an ASGI application: predictions, models, health, metrics and documentation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mopefuse import __version__
from mopefuse.core.error_codes import RequestCode
from mopefuse.errors import MopefuseError, RequestError
from mopefuse.serving.engine.catalogue import Catalogue, Entry
from mopefuse.serving.http import docs_page, openapi, try_page
from mopefuse.serving.http.metrics import CONTENT_TYPE
from mopefuse.serving.http.middleware import EveryRequest, Record, log_line, record_of
from mopefuse.serving.http.responses import error_body, error_response, json_response, status_of
from mopefuse.serving.http.service import Service
from mopefuse.serving.server_settings import ServerSettings
from mopefuse.serving.workers.batching import Predictor

_GONE = 499  # the status in the log for a client that did not wait; it never gets a response
_PATHS = ("/predict", "/models", "/health", "/ready", "/metrics", "/docs", "/openapi.json", "/")
_CLIENT_HEADERS = ["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"]


def create_app(
    catalogue: Catalogue,
    predictor: Predictor,
    settings: ServerSettings,
    log: Callable[[Record], None] | None = None,
) -> FastAPI:
    """The application; ``app.state.service`` is its `mopefuse.serving.http.service.Service`.

    Args:
        predictor: computes the answers, such as a `mopefuse.serving.workers.batching.Batcher`.
        log: takes the record of each request; by default it prints a line on stderr.

    Raises:
        RequestError: one of the hosts in `settings` is not one.
    """
    service = Service(catalogue, predictor, settings)
    write = log or _log_to_stderr(settings.log_format)

    def finish(record: Record) -> None:
        path = "/models" if record.path.startswith("/models/") else record.path
        service.metrics.count_request(path if path in _PATHS else "other", record.status, record.seconds)
        write(record)

    app = FastAPI(title="mopefuse", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service = service
    _add_predictions(app, service)
    _add_monitoring(app, service)
    _add_pages(app, service)
    app.add_exception_handler(MopefuseError, _on_error(service))
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(EveryRequest, key=settings.api_key, log=finish)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors,
            allow_methods=["GET", "POST"],
            allow_headers=_CLIENT_HEADERS,
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    return app


def _add_predictions(app: FastAPI, service: Service) -> None:
    @app.post("/predict")
    async def predict(request: Request) -> Response:
        try:
            return await service.predict(request)
        except ClientDisconnect:
            return Response(status_code=_GONE)

    @app.get("/models")
    async def models() -> Response:
        return json_response({"models": [_facts(entry) for entry in service.catalogue.entries().values()]})

    @app.get("/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(service.catalogue.find(name).facts)


def _add_monitoring(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        return json_response({"status": "alive", "version": __version__})

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = service.predictor.is_ready() and not service.draining
        status = "ready" if is_ready else "draining" if service.draining else "loading"
        return json_response({"status": status}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)


def _add_pages(app: FastAPI, service: Service) -> None:
    has_key = bool(service.settings.api_key)

    @app.get("/openapi.json")
    async def description() -> Response:
        return json_response(openapi.describe(service.catalogue, has_key=has_key))

    @app.get("/docs")
    async def docs() -> Response:
        return docs_page.docs_page()

    for name in docs_page.FILES:
        app.add_route(f"/docs/{name}", _docs_file(name))

    @app.get("/")
    async def home() -> Response:
        return try_page.try_page()


def _docs_file(name: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def respond(_: Request) -> Response:
        return docs_page.docs_file(name)

    return respond


def _facts(entry: Entry) -> dict[str, Any]:
    """The facts of a model; of one that cannot be read, its name."""
    try:
        return entry.facts
    except MopefuseError as error:
        return {"name": entry.name, "error": error_body(error)}


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
    what = f"{request.method} {request.url.path}: {error.detail}"
    fix = f"use POST /predict, or GET {', '.join(_PATHS[1:6])}"
    unknown = RequestError(RequestCode.NO_SUCH_ROUTE, what, where="path", fix=fix)
    record.error = unknown.code
    body = {"error": error_body(unknown), "request_id": record.id}
    return json_response(body, error.status_code, dict(error.headers or {}))


def _log_to_stderr(form: str) -> Callable[[Record], None]:
    return lambda record: print(log_line(record, form), file=sys.stderr, flush=True)
