"""``mopefuse serve`` as a process: faults of clients and workers, the end of the server, and predictions of real models."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from chromium import Chromium
from conftest import call
from PIL import Image
from serving_cases import PATIENCE, Running, encoded, fake_server, png, running, wait_for

import mopefuse
from mopefuse.core.error_codes import CheckpointCode, ConfigCode, DataCode, PackageCode, RequestCode

pytestmark = pytest.mark.process
HEAD = b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def fake(trained: Path) -> Iterator[Running]:
    with fake_server(trained, read_timeout=0.5, max_body_mb=1, log_format="json") as server:
        yield server


class Load:
    """Clients that send requests one after the other, each on a connection of its own, until told to stop."""

    def __init__(self, server: Running, clients: int, text: str = "sleep 0.01") -> None:
        self.statuses: Counter[Any] = Counter()
        self._server, self._text, self._stop = server, text, threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        with httpx.Client(timeout=PATIENCE) as client:
            while not self._stop.is_set():
                try:
                    status: Any = client.post(f"{self._server.url}/predict", json={"text": self._text}).status_code
                except httpx.ConnectError:
                    status = "closed"  # it listens no more
                    self._stop.set()
                except httpx.TransportError as error:
                    status = type(error).__name__
                self.statuses[status] += 1

    def wait_for(self, more: int) -> None:
        """Wait for so many more answers."""
        before = self.statuses[200]
        wait_for(lambda: self.statuses[200] >= before + more, f"{more} answers after {self.statuses}")

    def stop(self) -> Counter[Any]:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        return self.statuses


# -- clients that misbehave


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /pre", HEAD, HEAD + b"content-length: 100\r\n\r\n{", HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{"],
    ids=["nothing", "half a line", "half the headers", "half a body", "half a chunk"],
)
def test_a_client_that_stalls_is_disconnected(fake: Running, sent: bytes) -> None:
    with fake.connect() as connection:
        began = time.monotonic()
        connection.sendall(sent)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert 0.4 < time.monotonic() - began < 10
    if b"\r\n\r\n" in sent:
        assert answer.startswith(b"HTTP/1.1 408") and RequestCode.BODY_INCOMPLETE.text.encode() in answer
    else:
        assert answer == b""
    assert fake.post(text="a").status_code == 200


def test_a_body_that_trickles_is_given_up(trained: Path) -> None:
    with fake_server(trained, read_timeout=1) as server, server.connect() as connection:
        connection.sendall(HEAD + b"content-length: 100000\r\n\r\n")
        began, answer = time.monotonic(), b""
        while not answer and time.monotonic() - began < 10:
            connection.sendall(b" ")
            connection.settimeout(0.2)
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 3


def test_endless_headers_are_cut_off(fake: Running) -> None:
    with fake.connect() as connection, pytest.raises((BrokenPipeError, ConnectionResetError)):
        connection.sendall(b"GET / HTTP/1.1\r\n" + b"a: bbbbbbbbbbb\r\n" * 1_000_000)


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_refused_before_it_was_sent(fake: Running, announced: bool) -> None:
    with fake.connect() as connection:
        size = b"content-length: 100000000\r\n" if announced else b"transfer-encoding: chunked\r\n"
        connection.sendall(HEAD + size + b"\r\n")
        if not announced:
            for _ in range(100):
                connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        answer = b""
        while RequestCode.BODY_TOO_LARGE.text.encode() not in answer:
            piece = connection.recv(65536)
            assert piece, "closed without an answer"
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413")
    assert fake.post(text="a").status_code == 200


def test_a_body_that_was_refused_is_not_read_for_ever(fake: Running) -> None:
    with fake.connect() as connection:
        connection.sendall(HEAD + b"content-length: 100000000\r\n\r\n")
        began = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            _trickle(connection)
        assert 0.4 < time.monotonic() - began < 10


def _trickle(connection: socket.socket) -> None:
    for _ in range(500):
        connection.sendall(b" ")
        time.sleep(0.02)


def test_requests_of_clients_that_left_are_not_computed(trained: Path) -> None:
    with fake_server(trained, max_batch=1) as server:
        before = server.metric("mopefuse_fake_batches")
        body = json.dumps({"text": "sleep 0.5"}).encode()
        for _ in range(10):
            with server.connect() as connection:
                connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
                time.sleep(0.03)
        assert server.post(text="a").status_code == 200
        assert server.metric("mopefuse_fake_batches") - before <= 4, "the first two had begun"
        assert server.metric("mopefuse_requests_unfinished") == 0


def test_ten_thousand_rows_at_once_are_answered_or_refused(trained: Path) -> None:
    with fake_server(trained, queue=500, max_rows=100) as server:
        body = json.dumps({"rows": [{"text": "sleep 0.001", "image": encoded(png((200, 200)))}] * 100}).encode()

        def send(_: int) -> httpx.Response:
            return httpx.post(f"{server.url}/predict", content=body, timeout=PATIENCE)

        with ThreadPoolExecutor(100) as clients:
            found = list(clients.map(send, range(100)))
        statuses = Counter(one.status_code for one in found)
        assert set(statuses) == {200, 429} and statuses[200] >= 5
        for one in found:
            if one.status_code == 429:
                assert 1 <= int(one.headers["retry-after"]) <= 60
                assert one.json()["error"]["code"] == RequestCode.QUEUE_FULL.text
            else:
                assert {row["label"] for row in one.json()["predictions"]} == {"sleep 0.001"}
        assert server.post(text="a").status_code == 200
        resident = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
        assert resident is not None and int(resident[1]) < 500_000


def test_connections_are_limited_if_asked(trained: Path) -> None:
    with fake_server(trained, max_connections=3) as server:
        kept = [server.connect() for _ in range(3)]
        response = wait_for(lambda: _refused(server), "a refusal")
        assert (response.status_code, response.json()["error"]["code"]) == (429, RequestCode.QUEUE_FULL.text)
        for connection in kept:
            connection.close()
        wait_for(lambda: server.post(text="a").status_code == 200, "a free place")


def _refused(server: Running) -> httpx.Response | None:
    response = httpx.get(f"{server.url}/health")
    return response if response.status_code == 429 else None


def test_a_single_client_does_not_wait_for_others(trained: Path) -> None:
    with fake_server(trained, max_wait_ms=500, log_format="json") as server, httpx.Client() as client:
        for _ in range(5):
            assert client.post(f"{server.url}/predict", json={"text": "a"}).status_code == 200
        lines = wait_for(lambda: five if len(five := [line for line in server.lines if "queue_ms" in line]) == 5 else [], "log")
        assert max(json.loads(line)["queue_ms"] for line in lines) < 250


def test_requests_of_several_clients_share_a_batch(trained: Path) -> None:
    with fake_server(trained, max_wait_ms=20_000, max_batch=8) as server:
        together = threading.Barrier(8)

        def send(number: int) -> Any:
            with httpx.Client(timeout=PATIENCE) as client:
                client.get(f"{server.url}/health")  # from now on, the server knows that this client may send something
                together.wait()
                return client.post(f"{server.url}/predict", json={"text": str(number)}).json()

        with ThreadPoolExecutor(8) as clients:
            found = list(clients.map(send, range(8)))
        assert [(one["label"], one["batch"]) for one in found] == [(str(number), 8) for number in range(8)]
        assert server.metric("mopefuse_batch_rows_count") == 1


# -- workers that die


def test_a_killed_worker_loses_no_request(trained: Path) -> None:
    with fake_server(trained, workers=2, max_wait_ms=1) as server:
        load = Load(server, 12)
        for killed in range(1, 4):
            load.wait_for(15)
            os.kill(server.workers()[0], signal.SIGKILL)
            wait_for(lambda: server.metric("mopefuse_worker_restarts_total") == killed, "the restart")  # noqa: B023
        load.wait_for(15)
        assert set(load.stop()) == {200}
        wait_for(lambda: server.metric("mopefuse_workers_ready") == 2, "both workers")


def test_a_request_that_kills_workers_is_answered_and_the_others_as_well(trained: Path) -> None:
    with fake_server(trained, workers=2) as server:
        load = Load(server, 4)
        response = server.post(text="kill")
        assert (response.status_code, response.json()["error"]["code"]) == (503, RequestCode.WORKER_LOST.text)
        assert set(load.stop()) == {200}


def test_a_worker_out_of_memory_is_503_and_goes_on(fake: Running) -> None:
    response = fake.post(text="memory")
    assert response.status_code == 503
    assert "out of memory" in response.text and "secret" not in response.text
    assert fake.post(rows=[{"text": "a"}, {"text": "memory"}]).json()["predictions"][0]["label"] == "a"
    assert fake.metric("mopefuse_worker_restarts_total") == 0
    assert any("/secret/path" in line for line in fake.lines), "the log has the details"


def test_a_server_whose_workers_cannot_load_ends_with_the_reason(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    next(run.glob("checkpoints/*/*.safetensors")).write_bytes(b"damaged")
    with running([sys.executable, "-m", "mopefuse", "serve", str(run), "--port", "0", "--device", "cpu"]) as server:
        assert server.process.wait(PATIENCE) == 6
        server.wait_for_line(r"^error\[MF-CKPT-\d+\]")


# -- the end of the server


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_no_accepted_request(trained: Path, number: int) -> None:
    with fake_server(trained) as server:
        load = Load(server, 8, "sleep 0.02")
        load.wait_for(20)
        assert server.stop(number) == 0
        statuses = load.stop()
        assert set(statuses) <= {200, 503, "closed"}
        assert statuses[503], "a polite refusal comes before the end"


def test_a_signal_to_all_processes_lets_accepted_requests_finish(trained: Path) -> None:
    with fake_server(trained) as server, ThreadPoolExecutor(1) as client:
        answer = client.submit(server.post, text="sleep 1")
        wait_for(lambda: server.metric("mopefuse_requests_unfinished") == 1, "the request")
        for worker in server.workers():
            os.kill(worker, signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503, "not ready")
        refused = server.post(text="a")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert answer.result().status_code == 200
        assert server.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("again", [False, True])
def test_the_end_is_not_put_off_for_ever(trained: Path, again: bool) -> None:
    with fake_server(trained, drain_timeout=60 if again else 0.3, read_timeout=1) as server, ThreadPoolExecutor(1) as client:
        client.submit(httpx.post, f"{server.url}/predict", json={"text": "sleep 50"}, timeout=PATIENCE)
        wait_for(lambda: server.metric("mopefuse_requests_unfinished") == 1, "the request")
        workers = server.workers()
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        if again:
            time.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0
        assert time.monotonic() - began < 20
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_workers_end_with_a_server_that_is_killed(trained: Path) -> None:
    with fake_server(trained, workers=2) as server:
        workers = server.workers()
        assert len(workers) == 2
        server.process.kill()
        wait_for(lambda: not any(_is_alive(worker) for worker in workers), "the end of the workers")


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


# -- starting it


def test_a_port_in_use_is_an_error(trained: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = call("serve", trained, "--port", other.getsockname()[1])
    assert (done.returncode, done.stderr.count("\n")) == (11, 1)
    assert RequestCode.PORT_IN_USE.text in done.stderr and "--port 0" in done.stderr


def test_a_server_cannot_be_started_with_nothing_or_nonsense(trained: Path, tmp_path: Path) -> None:
    for arguments, code in (
        ((), RequestCode.NOTHING_TO_SERVE),
        ((trained, trained), RequestCode.EQUAL_MODEL_NAMES),
        ((tmp_path,), CheckpointCode.NOT_FOUND),
        (("--adapters", tmp_path / "none"), RequestCode.NOTHING_TO_SERVE),
        ((trained, "--log-format", "xml"), ConfigCode.UNKNOWN_NAME),
        ((trained, "--allow-urls", "https://a.example"), RequestCode.URLS_NOT_ALLOWED),
        ((trained, "--host", "no.such.host.invalid"), RequestCode.PORT_IN_USE),
    ):
        done = call("serve", *arguments, "--port", 0)
        assert code.text in done.stderr, (arguments, done.stderr)


def test_a_missing_package_is_named(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "uvicorn" else find(name, *more))
    done = call("serve", trained)
    assert PackageCode.PACKAGE_MISSING.text in done.stderr
    assert 'pip install "mopefuse[serve]"' in done.stderr


# -- real models


@pytest.fixture(scope="module")
def real(trained: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    adapters = tmp_path_factory.mktemp("adapters")
    assert call("export", trained, "--format", "adapter", "-o", adapters / "first").returncode == 0
    command = [sys.executable, "-m", "mopefuse", "serve", str(trained), f"b={exported}", "--adapters", str(adapters)]
    with running([*command, "--port", "0", "--device", "cpu", "--threads", "1", "--max-pixels", "2000"]) as server:
        server.wait_until_ready()
        server.adapters = adapters  # type: ignore[attr-defined]
        yield server


def test_predictions_are_those_of_the_models(real: Running, trained: Path, exported: Path) -> None:
    line = real.wait_for_line("^try: curl")
    assert real.url in line and "-F model=b" in line
    image, text = png(), "what is the red digit"
    rows = [{"model": name, "image": encoded(image), "text": text} for name in ("trained", "b", "first")]
    found = real.post(rows=rows).json()["predictions"]
    for prediction, folder in zip(found, (trained, exported, trained), strict=True):
        expected = mopefuse.load(folder, device="cpu").predict([Image.open(io.BytesIO(image))], [text])[0]
        assert prediction["label"] == expected["label"]
        assert prediction["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)


def test_the_printed_command_works(real: Running, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    line = real.wait_for_line("^try: curl").removeprefix("try: ")
    command = line.replace("FILE", str(tmp_path / "a.png"))
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    found = subprocess.run(["/bin/sh", "-c", f"{command} -s"], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["label"] in "abc"


def test_an_image_with_too_many_pixels_or_of_no_format_is_refused(real: Running) -> None:
    bomb = real.post(model="trained", image=encoded(png((2000, 2000))), text="a")
    assert (bomb.status_code, bomb.json()["error"]["code"]) == (413, DataCode.TOO_MANY_PIXELS.text)
    wrong = real.post(model="trained", image=encoded(b"no image"), text="a")
    assert (wrong.status_code, wrong.json()["error"]["where"]) == (422, "image")
    missing = real.post(model="trained", text="a")
    assert (missing.status_code, missing.json()["error"]["code"]) == (422, DataCode.MODALITY_REQUIRED.text)


def test_an_adapter_can_be_removed_and_added_while_it_is_used(real: Running, tmp_path: Path) -> None:
    adapters: Path = real.adapters  # type: ignore[attr-defined]
    shutil.copytree(adapters / "first", tmp_path / "second")
    (tmp_path / "second").rename(adapters / "second")
    body = {"model": "second", "image": encoded(png()), "text": "a"}
    assert real.post(**body).status_code == 200
    with ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(real.post, **body) for _ in range(60)]
        (adapters / "second").rename(tmp_path / "removed")
        statuses = {answer.result().status_code for answer in answers}
    assert statuses <= {200, 404}
    wait_for(lambda: real.post(**body).status_code == 404, "the removal")
    assert real.metric("mopefuse_worker_restarts_total") == 0


def test_the_documentation_works_in_a_browser(real: Running, browser: Chromium) -> None:
    browser.requests, browser.complaints = [], []
    browser.ask("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)
    browser.ask("Page.navigate", url=f"{real.url}/docs")

    def count(selector: str) -> int:
        return int(browser.evaluate(f"document.querySelectorAll('.opblock-post {selector}').length"))

    def click(selector: str) -> None:
        wait_for(lambda: count(selector), selector)
        browser.evaluate(f"document.querySelector('.opblock-post {selector}').click()")

    click(".opblock-summary-control")
    wait_for(lambda: count("textarea"), "the example")
    wait_for(lambda: click(".execute") or count(".live-responses-table .response"), "the response")
    found = browser.evaluate("document.querySelector('.opblock-post .live-responses-table .response').innerText")
    assert found.startswith("200") and '"label"' in found
    assert {url for url in browser.requests if not url.startswith((real.url, "data:"))} == set()
    assert browser.complaints == []


def test_bundles_are_served_without_torch(exported: Path, tmp_path: Path) -> None:
    for name in ("torch", "torchvision", "transformers", "timm", "open_clip"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError(f'{__name__} was imported')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "mopefuse", "serve", str(exported), "--port", "0"]
    with running(command, PYTHONPATH=path) as server:
        server.wait_until_ready()
        response = server.post(image=encoded(png()), text="what is the red digit", top=1)
        assert (response.status_code, len(response.json()["probabilities"])) == (200, 1)
        assert server.stop() == 0
        assert not any("AssertionError" in line for line in server.lines)
