"""``POST /predict``: from a request to its response."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mopefuse.core.error_codes import RequestCode
from mopefuse.errors import MopefuseError, RequestError
from mopefuse.serving.engine.catalogue import Catalogue
from mopefuse.serving.http.body import read_body, read_form
from mopefuse.serving.http.image_urls import UrlReader
from mopefuse.serving.http.metrics import Metrics
from mopefuse.serving.http.middleware import record_of
from mopefuse.serving.http.parse import Body, Row, parse_form, parse_json
from mopefuse.serving.http.responses import error_body, json_response, status_of
from mopefuse.serving.server_settings import ServerSettings
from mopefuse.serving.workers.batching import Predictor, Served

_LARGE = 200_000  # bytes of a body that is parsed by a thread, so that other requests do not wait
_URLS_AT_ONCE = 8  # of one request
_AFTER_SHUTDOWN = 5  # seconds

T = TypeVar("T")
Hold = Callable[[int], None]


class Service:
    """What the routes share.

    Attributes:
        draining: whether the server is about to end, and takes no more requests. metrics: counts all requests.
    """

    def __init__(self, catalogue: Catalogue, predictor: Predictor, settings: ServerSettings) -> None:
        self.catalogue, self.predictor, self.settings = catalogue, predictor, settings
        self.metrics = Metrics(predictor.stats)
        self.draining = False
        self._urls = UrlReader(settings.allow_urls, limit=settings.max_body, timeout=settings.read_timeout)
        self._held = 0

    async def predict(self, request: Request) -> Response:
        """The response.

        Raises:
            MopefuseError: the request cannot be answered as a whole. ClientDisconnect: nobody waits for an answer.
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
            if any(row.urls for row in body.rows):
                body = Body(await self._read_urls(body.rows, hold), body.single)
            return await self._answer(request, body)
        finally:
            self._held -= held

    def headers_for(self, error: MopefuseError) -> dict[str, str]:
        """Headers of the response to an error.

        The connection of a body that is too large stays open for a while (see `mopefuse.serving.http.connections`): if it was
        closed while the client still sends, the client would not see the response.
        """
        if error.code == RequestCode.QUEUE_FULL.text:
            return {"Retry-After": str(self.predictor.retry_after())}
        if error.code == RequestCode.SHUTTING_DOWN.text:
            return {"Retry-After": str(_AFTER_SHUTDOWN), "Connection": "close"}
        return {"Connection": "close"} if error.code == RequestCode.BODY_INCOMPLETE.text else {}

    async def _parse(self, request: Request, hold: Hold) -> Body:
        settings = self.settings
        content = await read_body(request, limit=settings.max_body, timeout=settings.read_timeout, hold=hold)
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return parse_form(await read_form(request, content), self._resolve)
        if len(content) > _LARGE:
            return await asyncio.to_thread(parse_json, content, self._resolve, max_rows=settings.max_rows)
        return parse_json(content, self._resolve, max_rows=settings.max_rows)

    def _resolve(self, name: str | None) -> str:
        return self.catalogue.find(name).name

    async def _read_urls(self, rows: list[Row], hold: Hold) -> list[Row]:
        """The rows with the files that they name by URL."""
        free = asyncio.Semaphore(_URLS_AT_ONCE)

        async def read(row: Row) -> Row:
            try:
                async with free:
                    files = {name: await self._urls.read(url, f"{name}_url", hold) for name, url in row.urls.items()}
                return row.with_files(files) if files else row
            except RequestError as error:
                return Row(row.id, error=error)

        return list(await asyncio.gather(*map(read, rows)))

    async def _answer(self, request: Request, body: Body) -> Response:
        wanted = [row.request for row in body.rows if row.request is not None]
        record = record_of(request.scope)
        record.rows, record.models = len(body.rows), sorted({one.model for one in wanted})
        served = iter(await self._while_connected(request, self.predictor.predict(wanted)) if wanted else [])
        answers = [next(served) if row.request is not None else _unserved(row) for row in body.rows]
        record.queued, record.batch = max(one.queued for one in answers), max(one.batch for one in answers)
        for row, one in zip(body.rows, answers, strict=True):
            model = row.request.model if row.request is not None else ""
            status = status_of(one.answer) if isinstance(one.answer, MopefuseError) else 200
            self.metrics.count_row(model, status, one.queued if one.batch else None)
        if body.single and isinstance(answers[0].answer, MopefuseError):
            raise answers[0].answer
        predictions = [_prediction(row, one) for row, one in zip(body.rows, answers, strict=True)]
        return json_response(predictions[0] if body.single else {"predictions": predictions})

    async def _while_connected(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
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


def _unserved(row: Row) -> Served:
    assert row.error is not None
    return Served(row.error, 0.0, 0)


def _prediction(row: Row, served: Served) -> dict[str, Any]:
    named = {} if row.id is None else {"id": row.id}
    if isinstance(served.answer, MopefuseError):
        return {**named, "error": error_body(served.answer)}
    assert row.request is not None
    return {"model": row.request.model, **named, **served.answer}
