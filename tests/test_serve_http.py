"""The HTTP interface without sockets and models: bodies, errors, keys, limits and documentation."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from conftest import LABELS
from serving_cases import encoded, png

from mopefuse.core.error_codes import DataCode, RequestCode, ResourceCode
from mopefuse.errors import CheckpointError, DataError, MopefuseError, ResourceError
from mopefuse.serving.engine.catalogue import Catalogue
from mopefuse.serving.engine.request import Answer, Request
from mopefuse.serving.http.app import create_app
from mopefuse.serving.http.middleware import Record, log_line
from mopefuse.serving.server_settings import ServerSettings
from mopefuse.serving.workers.batching import Served


class Recorder:
    """A predictor that remembers the requests, and answers with their texts or with `answer`."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answer: Answer | None = None
        self.ready = True

    async def predict(self, requests: Sequence[Request]) -> list[Served]:
        self.requests += requests
        return [Served(self.answer or {"label": request.values.get("text")}, 0.002, len(requests)) for request in requests]

    def is_ready(self) -> bool:
        return self.ready

    def retry_after(self) -> int:
        return 7

    def stats(self) -> dict[str, float]:
        return {"queue_length": 3, "model_loads": 2}


class Site:
    """The application with a predictor that records, and its log."""

    def __init__(self, models: Sequence[str], **settings: Any) -> None:
        self.predictor, self.log = Recorder(), list[Record]()
        self.app = create_app(Catalogue(models), self.predictor, ServerSettings(**settings), self.log.append)

    def send(self, method: str, path: str, **how: Any) -> httpx.Response:
        async def main() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **how)

        return asyncio.run(main())

    def post(self, body: Any = None, **how: Any) -> httpx.Response:
        return self.send("POST", "/predict", **({"json": body} if body is not None else {}), **how)

    def get(self, path: str, **how: Any) -> httpx.Response:
        return self.send("GET", path, **how)


@pytest.fixture
def site(trained: Path) -> Site:
    return Site([f"m={trained}"])


@pytest.fixture
def make_site(trained: Path) -> Callable[..., Site]:
    return lambda *names, **settings: Site([f"{name}={trained}" for name in names or ("m",)], **settings)


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    """Status, code and place; every error has the same form."""
    body = response.json()
    assert set(body) == {"error", "request_id"}
    assert set(body["error"]) == {"code", "message", "where", "hint"}
    assert body["request_id"] == response.headers["x-request-id"] != ""
    assert "Traceback" not in response.text
    return response.status_code, body["error"]["code"], body["error"]["where"]


# -- bodies


def test_one_row_is_one_request(site: Site) -> None:
    body = {"image": encoded(png()), "text": "what", "top": 2, "routing": True, "id": 7}
    response = site.post(body)
    assert (response.status_code, response.json()) == (200, {"model": "m", "id": 7, "label": "what"})
    assert site.predictor.requests == [Request("m", {"image": png(), "text": "what"}, 2, True)]


@pytest.mark.parametrize("prefix", ["data:image/png;base64,", "DATA:;base64,", "\n"])
def test_an_image_may_be_a_data_url_and_have_line_breaks(site: Site, prefix: str) -> None:
    text = base64.encodebytes(png((99, 99))).decode()
    assert "\n" in text
    assert site.post({"image": prefix + text}).status_code == 200
    assert site.predictor.requests[0].values == {"image": png((99, 99))}


def test_an_id_that_json_cannot_hold_is_refused(make_site: Callable[..., Site]) -> None:
    response = make_site("a").send("POST", "/predict", content=b'{"text": "one", "id": 1e999}')
    assert (response.status_code, response.json()["error"]["where"]) == (400, "id")


def test_several_rows_share_options_and_their_mistakes_stay_their_own(make_site: Callable[..., Site]) -> None:
    site = make_site("a", "b")
    rows = [
        {"text": "one"},
        {"text": "two", "model": "b", "top": 5, "id": "x"},
        {"text": "three", "model": "nope", "id": "y"},
        {"image": "!", "id": 1.5},
        "row",
        {"text": "six", "top": 0},
        {"text": None, "image": None},
    ]
    response = site.post({"model": "a", "top": 1, "rows": rows})
    assert response.status_code == 200
    found = response.json()["predictions"]
    assert found[:2] == [{"model": "a", "label": "one"}, {"model": "b", "id": "x", "label": "two"}]
    assert [(one.get("id"), one["error"]["code"]) for one in found[2:6]] == [
        ("y", RequestCode.NO_SUCH_MODEL.text),
        (1.5, RequestCode.BAD_REQUEST.text),
        (None, RequestCode.BAD_REQUEST.text),
        (None, RequestCode.BAD_REQUEST.text),
    ]
    assert found[6]["model"] == "a", "whether a model can do without any value is for the engine to say"
    assert [(one.model, one.top) for one in site.predictor.requests] == [("a", 1), ("b", 5), ("a", 1)]


def test_a_form_is_one_row(site: Site) -> None:
    files = {"image": ("a.png", png(), "image/png")}
    response = site.post(data={"text": "what", "top": "2", "routing": "true", "model": ""}, files=files)
    assert response.json() == {"model": "m", "label": "what"}
    assert site.predictor.requests == [Request("m", {"text": "what", "image": png()}, 2, True)]


def test_a_body_is_read_as_json_whatever_its_type(site: Site) -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        assert site.post(content=b'{"text": "a"}', headers={"content-type": kind}).status_code == 200


BAD = RequestCode.BAD_REQUEST.text
WRONG: dict[str, tuple[Any, int, str, str]] = {
    "nothing": (b"", 400, BAD, "line 1, column 1"),
    "not JSON": (b"{", 400, BAD, "line 1, column 2"),
    "not UTF-8": (b'{"text": "\xff"}', 400, BAD, "body"),
    "too deep": (b"[" * 100_000, 400, BAD, "body"),
    "not a number of JSON": (b'{"top": NaN}', 400, BAD, "body"),
    "a long number": (b'{"top": ' + b"1" * 10_000 + b"}", 400, BAD, "body"),
    "a list": ([], 400, BAD, "body"),
    "no values": ({}, 400, BAD, "body"),
    "an unknown field": ({"txt": "a"}, 400, BAD, "txt"),
    "base64": ({"image": "%%%"}, 400, BAD, "image"),
    "a data URL": ({"image": "data:image/png,xx"}, 400, BAD, "image"),
    "an image that is a number": ({"image": 3}, 400, BAD, "image"),
    "an address as image": ({"image": "https://example.com/a.png"}, 400, BAD, "image"),
    "a text that is a list": ({"text": ["a"]}, 400, BAD, "text"),
    "top": ({"text": "a", "top": 0}, 400, BAD, "top"),
    "top as text": ({"text": "a", "top": "1"}, 400, BAD, "top"),
    "top as bool": ({"text": "a", "top": True}, 400, BAD, "top"),
    "routing": ({"text": "a", "routing": 1}, 400, BAD, "routing"),
    "id": ({"text": "a", "id": [1]}, 400, BAD, "id"),
    "model": ({"text": "a", "model": 1}, 400, BAD, "model"),
    "unknown model": ({"text": "a", "model": "../m"}, 404, RequestCode.NO_SUCH_MODEL.text, "model"),
    "no rows": ({"rows": []}, 400, BAD, "rows"),
    "rows that are none": ({"rows": {}}, 400, BAD, "rows"),
    "a value next to rows": ({"rows": [{"text": "a"}], "text": "b"}, 400, BAD, "text"),
    "too many rows": ({"rows": [{"text": "a"}] * 65}, 413, RequestCode.TOO_MANY_ROWS.text, "rows"),
    "a URL": ({"image_url": "https://example.com/a.png"}, 403, RequestCode.URLS_NOT_ALLOWED.text, "image_url"),
    "a URL of a text": ({"text_url": "https://example.com"}, 400, BAD, "text_url"),
    "both": ({"image_url": "https://example.com", "image": "AAAA"}, 400, BAD, "image"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_body_is_explained(site: Site, case: str) -> None:
    body, status, code, where = WRONG[case]
    response = site.post(content=body) if isinstance(body, bytes) else site.post(body)
    assert error_of(response) == (status, code, where)
    assert response.json()["error"]["hint"]
    assert site.predictor.requests == []


FORM = {"content-type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"--x\r\n", FORM),
        (b"", FORM),
        (b"nonsense", FORM),
        (b"--x--\r\n", {"content-type": "multipart/form-data"}),
        (b'--x\r\ncontent-disposition: form-data; name="image"\r\n\r\nabc\r\n--x--\r\n', FORM),
        (b'--x\r\ncontent-disposition: form-data; name="top"\r\n\r\ntwo\r\n--x--\r\n', FORM),
        (b'--x\r\ncontent-disposition: form-data\r\n\r\nabc\r\n--x--\r\n', FORM),
        (b'--x\r\ncontent-disposition: form-data; name="text"\r\n\r\na\r\n' * 2 + b"--x--\r\n", FORM),
    ],
)
def test_a_wrong_form_is_explained(site: Site, content: bytes, headers: dict[str, str]) -> None:
    assert error_of(site.post(content=content, headers=headers))[:2] == (400, BAD)


def test_a_request_names_its_model_if_there_are_several(make_site: Callable[..., Site]) -> None:
    response = make_site("a", "b").post({"text": "x"})
    assert error_of(response) == (422, RequestCode.MODEL_NOT_NAMED.text, "model")
    assert "a, b" in response.json()["error"]["hint"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_is_limited_whether_it_is_announced_or_not(make_site: Callable[..., Site], announced: bool) -> None:
    site = make_site(max_body_mb=0.01)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(1000):
            sent.append(1)
            yield b" " * 1000

    sent: list[int] = []
    response = site.post(content=b" " * 1_000_000 if announced else pieces())
    assert error_of(response)[:2] == (413, RequestCode.BODY_TOO_LARGE.text)
    assert len(sent) < 20, "the rest is not read"
    fitting = json.dumps({"text": "a" * 9_000}).encode()
    assert site.post(content=fitting).status_code == 200


def test_bodies_share_a_limit_of_memory(make_site: Callable[..., Site]) -> None:
    response = make_site(queue_mb=0.001).post({"text": "a" * 2000})
    assert error_of(response)[:2] == (429, RequestCode.QUEUE_FULL.text)
    assert response.headers["retry-after"] == "7"
    site = make_site(queue_mb=0.005)
    assert {site.post({"text": "a" * 4000}).status_code for _ in range(5)} == {200}, "it is free again after each"


# -- answers


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DataError(DataCode.TOO_MANY_PIXELS, "too large", where="image", fix="f"), 413, "too large"),
        (DataError(DataCode.FILE_UNREADABLE, "cannot be read", where="image", fix="f"), 422, "cannot be read"),
        (ResourceError(ResourceCode.GPU_MEMORY, "out of GPU memory", where="/secret/a"), 503, "out of GPU memory"),
        (ResourceError(ResourceCode.CANNOT_WRITE, "/secret/b: disk full", fix="f"), 503, "the model cannot be used"),
        (CheckpointError(2, "/secret/c is damaged", where="/secret/d", fix="rm /secret"), 500, "the model cannot be used"),
    ],
)
def test_an_error_has_a_status_and_names_no_file_of_the_server(
    site: Site, error: MopefuseError, status: int, message: str
) -> None:
    site.predictor.answer = error
    response = site.post({"text": "a"})
    assert error_of(response)[:2] == (status, error.code)
    assert response.json()["error"]["message"] == message
    assert "secret" not in response.text
    several = site.post({"rows": [{"text": "a", "id": 1}]})
    assert (several.status_code, several.json()["predictions"][0]["id"]) == (200, 1)
    assert "secret" not in several.text


def test_a_bug_is_an_error_without_details(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.predictor.answer = [1]  # type: ignore[assignment]
    response = site.post({"text": "a"}, headers={"x-request-id": "bug-1"})
    assert error_of(response)[:2] == (500, RequestCode.SERVER_FAILED.text)
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "bug-1" in printed
    assert site.post({"text": "a"}).status_code == 500, "and the server goes on"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("GET", "/predict", 405), ("PUT", "/", 405)])
def test_an_unknown_path_or_method_is_an_error_of_the_same_form(site: Site, method: str, path: str, status: int) -> None:
    assert error_of(site.send(method, path))[:2] == (status, RequestCode.NO_SUCH_ROUTE.text)


def test_models_are_described(make_site: Callable[..., Site], trained: Path) -> None:
    site = make_site("a", "b")
    found = site.get("/models").json()["models"]
    assert [one["name"] for one in found] == ["a", "b"]
    assert found[0] == site.get("/models/a").json()
    assert (found[0]["labels"], sorted(found[0]["modalities"])) == ([*LABELS], ["image", "text"])
    assert str(trained.parent) not in site.get("/models").text
    assert error_of(site.get("/models/c"))[:2] == (404, RequestCode.NO_SUCH_MODEL.text)


def test_ready_says_whether_requests_are_taken(site: Site) -> None:
    assert (site.get("/health").status_code, site.get("/ready").status_code) == (200, 200)
    site.predictor.ready = False
    assert (site.get("/health").status_code, site.get("/ready").status_code) == (200, 503)
    site.predictor.ready, site.app.state.service.draining = True, True
    assert (site.get("/health").status_code, site.get("/ready").json()) == (200, {"status": "draining"})
    response = site.post({"text": "a"})
    assert error_of(response)[:2] == (503, RequestCode.SHUTTING_DOWN.text)
    assert (response.headers["retry-after"], response.headers["connection"]) == ("5", "close")


# -- every request


@pytest.mark.parametrize(
    "headers", [{"authorization": "Bearer s3cret"}, {"AUTHORIZATION": "bearer  s3cret"}, {"x-api-key": "s3cret"}]
)
def test_the_right_key_is_accepted(make_site: Callable[..., Site], headers: dict[str, str]) -> None:
    site = make_site(api_key="s3cret")
    assert site.post({"text": "a"}, headers=headers).status_code == 200
    assert site.get("/metrics", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer"}, {"authorization": "Basic s3cret"}, {"x-api-key": "s3cre"}, {"x-api-key": "é"}]
)
def test_a_missing_or_wrong_key_is_refused(make_site: Callable[..., Site], headers: dict[str, str]) -> None:
    site = make_site(api_key="s3cret")
    sent = {name: value.encode() for name, value in headers.items()}
    for path in ("/models", "/models/m", "/metrics", "/nope"):
        response = site.get(path, headers=sent)
        assert error_of(response)[:2] == (401, RequestCode.BAD_KEY.text)
        assert response.headers["www-authenticate"].startswith("Bearer")
    assert error_of(site.post({"text": "a"}, headers=sent))[0] == 401
    assert site.predictor.requests == []


def test_what_is_open_with_a_key_names_no_model(make_site: Callable[..., Site]) -> None:
    site = make_site("private", api_key="s3cret")
    for path in ("/health", "/ready", "/docs", "/openapi.json", "/"):
        response = site.get(path, follow_redirects=True)
        assert response.status_code == 200
        assert "private" not in response.text


@pytest.mark.parametrize(
    ("sent", "returned"), [("abc-1.2", "abc-1.2"), ("a b\x01<script>", "abscript"), ("x" * 500, "x" * 128)]
)
def test_a_request_id_is_returned_and_logged(site: Site, sent: str, returned: str) -> None:
    response = site.post({"text": "a"}, headers={"x-request-id": sent.encode()})
    assert response.headers["x-request-id"] == returned == site.log[-1].id


def test_a_request_without_an_id_gets_one(site: Site) -> None:
    ids = {site.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


def test_the_log_says_what_a_request_was(site: Site) -> None:
    site.post({"rows": [{"text": "a"}, {"text": "b"}, 3]})
    site.post({"text": "a", "model": "nope"})
    first, second = (json.loads(log_line(record, "json")) for record in site.log)
    expected = {"method": "POST", "path": "/predict", "status": 200, "models": ["m"], "rows": 3, "queue_ms": 2.0, "batch": 2}
    assert {name: first[name] for name in expected} == expected
    assert first["ms"] > 0
    assert (second["status"], second["error"]) == (404, RequestCode.NO_SUCH_MODEL.text)
    hostile = log_line(Record("id", "GET", "/a\n\x1b[31m", 404), "text")
    assert "\n" not in hostile and "\x1b" not in hostile


def test_pages_of_other_sites_may_only_call_if_they_are_named(make_site: Callable[..., Site]) -> None:
    asking = {"origin": "https://a.example", "access-control-request-method": "POST"}
    asking["access-control-request-headers"] = "x-api-key"
    closed = make_site().send("OPTIONS", "/predict", headers=asking)
    assert "access-control-allow-origin" not in closed.headers
    site = make_site(cors=("https://a.example",), api_key="k")
    assert site.send("OPTIONS", "/predict", headers=asking).headers["access-control-allow-origin"] == "https://a.example"
    other = site.send("OPTIONS", "/predict", headers=asking | {"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
    answered = site.post({"text": "a"}, headers={"origin": "https://a.example", "x-api-key": "k"})
    assert "X-Request-ID" in answered.headers["access-control-expose-headers"]


# -- metrics and documentation


def test_metrics_count_rows_by_model_and_status_with_few_labels(make_site: Callable[..., Site]) -> None:
    names = [f"m{number}" for number in range(250)]
    site = make_site(*names)
    for start in range(0, 250, 50):
        site.post({"rows": [{"text": "a", "model": name} for name in names[start : start + 50]]})
    for number in range(300):
        site.get(f"/unknown/{number}")
    site.post({"text": "a", "model": "nope"})
    text = site.get("/metrics").text
    assert 'mopefuse_rows_total{model="m0",status="200"} 1.0' in text
    assert 'mopefuse_rows_total{model="other",status="200"} 50.0' in text
    assert 'mopefuse_http_requests_total{path="other",status="404"} 300.0' in text
    assert 'mopefuse_http_requests_total{path="/predict",status="404"} 1.0' in text
    assert "mopefuse_predict_seconds_count 6.0" in text and "mopefuse_queue_seconds_count 250.0" in text
    assert "mopefuse_queue_length 3.0" in text and "mopefuse_model_loads_total 2.0" in text
    assert len(text.splitlines()) < 1000


def test_the_documentation_loads_nothing_from_elsewhere(site: Site) -> None:
    page = site.get("/docs")
    assert re.findall(r"""(?:src|href)="([^"]+)""", page.text) == ["docs/swagger-ui.css", "data:,", "docs/swagger-ui-bundle.js"]
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert b"SwaggerUIBundle" in site.get("/docs/swagger-ui-bundle.js").content
    assert site.get("/docs/swagger-ui.css").headers["content-type"].startswith("text/css")
    assert error_of(site.get("/docs/../app.py"))[0] == 404


def test_every_documented_example_works_and_every_path_is_documented(site: Site) -> None:
    document = site.get("/openapi.json").json()
    for example in document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["examples"].values():
        response = site.post(example["value"])
        assert response.status_code == 200
        assert "error" not in response.text
    assert site.predictor.requests[0].model == "m"
    assert {"image", "text"} <= site.predictor.requests[0].values.keys()
    routes = {route.path.replace(":path", "") for route in site.app.routes}  # type: ignore[attr-defined]
    assert document["paths"].keys() == {path for path in routes if not path.startswith(("/docs", "/openapi.json"))} - {"/"}


# -- images by URL


class _Files(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        _, status, rest = self.path.split("/", 2)
        self.send_response(int(status))
        if status == "302":
            self.send_header("Location", "/200/a.png" if rest == "here" else rest)
        self.end_headers()
        content = b"x" * 3_000_000 if rest == "large" else png()
        if status == "200":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Files)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["/200/a.png", "/302/here"])
def test_an_image_is_read_from_an_allowed_host(make_site: Callable[..., Site], host: str, path: str) -> None:
    site = make_site(allow_urls=(host,))
    assert site.post({"text": "a", "image_url": f"http://{host}{path}"}).status_code == 200
    assert site.predictor.requests == [Request("m", {"text": "a", "image": png()})]


NOT_ALLOWED, UNREADABLE = RequestCode.URLS_NOT_ALLOWED.text, RequestCode.URL_UNREADABLE.text


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("http://localhost:{port}/200/a", 403, NOT_ALLOWED),
        ("http://127.0.0.1/200/a", 403, NOT_ALLOWED),
        ("http://127.0.0.1:{port}@evil.example/", 422, UNREADABLE),
        ("http://named.example/a", 403, NOT_ALLOWED),
        ("https://other.example/a", 403, NOT_ALLOWED),
        ("file:///etc/passwd", 422, UNREADABLE),
        ("nonsense", 422, UNREADABLE),
        ("http://[::1", 422, UNREADABLE),
        ("http://127.0.0.1:{port}/404/a", 422, UNREADABLE),
        ("http://127.0.0.1:{port}/200/large", 422, UNREADABLE),
        ("http://127.0.0.1:{port}/302/http://localhost:{port}/200/a", 403, NOT_ALLOWED),
        ("http://127.0.0.1:{port}/302/https://named.example/a", 422, UNREADABLE),
        ("http://127.0.0.1:{port}/302/302/here", 422, UNREADABLE),
    ],
)
def test_other_urls_are_refused(make_site: Callable[..., Site], host: str, url: str, status: int, code: str) -> None:
    site = make_site(allow_urls=(host, "named.example"), max_body_mb=1)
    response = site.post({"image_url": url.replace("{port}", host.split(":")[1])})
    assert error_of(response) == (status, code, "image_url")
    assert site.predictor.requests == []


def test_an_allowed_host_cannot_redirect_to_another(make_site: Callable[..., Site], host: str) -> None:
    other = host.replace("127.0.0.1", "localhost")
    site = make_site(allow_urls=(host, other))
    assert site.post({"image_url": f"http://{other}/200/a.png"}).status_code == 200
    response = site.post({"image_url": f"http://{host}/302/http://{other}/200/a.png"})
    assert error_of(response) == (422, UNREADABLE, "image_url")
    assert "another host" in response.json()["error"]["message"]


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:10.0.0.1", "0.0.0.0"])
def test_a_name_with_a_private_address_is_refused(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    async def resolve(loop: Any, host: str, port: int, **how: Any) -> list[Any]:
        return [(None, None, None, "", (address, port))]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", resolve)
    response = make_site(allow_urls=("named.example",)).post({"image_url": "https://named.example/a.png"})
    assert error_of(response) == (403, NOT_ALLOWED, "image_url")


@pytest.mark.parametrize("host", ["https://a.example", "a.example/x", "u@a.example", "", "a:b"])
def test_an_allowed_host_has_to_be_a_host(make_site: Callable[..., Site], host: str) -> None:
    with pytest.raises(MopefuseError, match="is not a host"):
        make_site(allow_urls=(host,))
