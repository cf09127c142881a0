"""When a client asks a server again, and what it makes of servers that are busy, broken or something else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

import mopefuse
from mopefuse.core.error_codes import RequestCode
from mopefuse.errors import RequestError


class Script:
    """Answers requests with statuses, headers and bodies in turn, the last one forever; None closes the connection."""

    def __init__(self, *answers: tuple[int, dict[str, str], str] | None) -> None:
        outer, self.asked = self, 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = answers[min(outer.asked, len(answers) - 1)]
                outer.asked += 1
                if answer is None:
                    self.connection.close()
                    return
                status, headers, body = answer
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                """Be silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def script() -> Iterator[Callable[..., Script]]:
    made: list[Script] = []

    def make(*answers: Any) -> Script:
        made.append(Script(*answers))
        return made[-1]

    yield make
    for one in made:
        one.close()


def refusal(code: RequestCode) -> str:
    return f'{{"error": {{"code": "{code.text}", "message": "busy", "where": "", "hint": "wait"}}}}'


FINE = (200, {}, '{"models": []}')
BUSY = refusal(RequestCode.QUEUE_FULL)


SEVEN = {"Retry-After": "7"}


@pytest.mark.parametrize(
    "busy",
    [(429, SEVEN, BUSY), (503, SEVEN, "<html>"), (503, {}, ""), (429, {"Retry-After": "x"}, ""), None],
    ids=["429", "503", "no header", "odd header", "lost connection"],
)
def test_a_busy_server_is_asked_again_when_it_says(
    busy: Any, script: Callable[..., Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server = script(busy, busy, FINE)
    with mopefuse.Client(server.url, retries=2) as client:
        assert client.models() == [] and server.asked == 3
    if busy and busy[1] == SEVEN:
        assert waits == [7, 7]
    else:
        assert 0.18 < waits[0] < 0.32 and 0.37 < waits[1] < 0.63, "it grows, with some noise"


def test_a_date_to_retry_at_is_understood_and_a_long_wait_is_bounded(
    script: Callable[..., Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=20), usegmt=True)
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    server = script(*((503, {"Retry-After": value}, "") for value in (soon, past, "86400")), FINE)
    with mopefuse.Client(server.url) as client:
        assert client.models() == []
    assert 15 < waits[0] <= 20 and waits[1:] == [0, 60]


def test_after_the_last_try_the_error_is_that_of_the_server(script: Callable[..., Script]) -> None:
    server = script((429, {"Retry-After": "0"}, BUSY))
    with mopefuse.Client(server.url, retries=2) as client, pytest.raises(RequestError, match="busy · fix: wait") as caught:
        client.models()
    assert caught.value.number == RequestCode.QUEUE_FULL and server.asked == 3
    closing = script(None)
    with mopefuse.Client(closing.url, retries=1) as client, pytest.raises(RequestError, match="cannot be reached"):
        client.models()


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500, 504])
def test_other_refusals_are_not_tried_again(status: int, script: Callable[..., Script]) -> None:
    server = script((status, {"Retry-After": "0"}, refusal(RequestCode.BAD_REQUEST)), FINE)
    with mopefuse.Client(server.url) as client, pytest.raises(RequestError, match="busy"):
        client.models()
    assert server.asked == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, "<html>"), (200, "[]"), (200, "{}"), (301, ""), (404, '{"detail": "Not Found"}'), (500, '{"error": {"code": "E"}}')],
)
def test_another_kind_of_server_is_recognised(status: int, body: str, script: Callable[..., Script]) -> None:
    server = script((status, {}, body))
    with mopefuse.Client(server.url) as client, pytest.raises(RequestError, match=f"status {status}, is not one of") as caught:
        client.models()
    assert caught.value.number == RequestCode.SERVER_FAILED


def test_a_server_that_does_not_answer_in_time_is_given_up() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as silent:  # accepts, and never answers
        url = f"http://127.0.0.1:{silent.server_port}"
        with mopefuse.Client(url, timeout=0.2) as client, pytest.raises(RequestError, match=r"within 0.2 seconds") as caught:
            client.models()
    assert caught.value.number == RequestCode.TIMED_OUT
