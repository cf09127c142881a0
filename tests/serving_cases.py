"""Helpers to test the server: a fake engine in real worker processes, and servers as processes.

Run as a program, it is a worker with the fake engine (``serving_cases.py FD``), or a server with such workers
(``serving_cases.py serve MODEL SETTINGS``).
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from mopefuse.core.error_codes import ResourceCode
from mopefuse.errors import MopefuseError, ResourceError
from mopefuse.serving.engine.request import Answer, Request

WORKER = (sys.executable, __file__)
PATIENCE = 60.0


def png(size: tuple[int, int] = (16, 16)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(content, "PNG")
    return content.getvalue()


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


class FakeEngine:
    """Does what the text of a request says, one request after the other: ``sleep 0.1``, ``kill``, ``kill once FILE``,
    ``memory``, ``raise``; the answer to any other is the text itself."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.batches = 0

    def load(self) -> None:
        if self.settings.get("fails"):
            raise ResourceError(ResourceCode.HOST_MEMORY, "out of memory", fix="buy more")
        if self.settings.get("dies"):
            os._exit(3)

    def predict(self, requests: Sequence[Request]) -> list[Answer]:
        self.batches += 1
        return [self._answer(request, len(requests)) for request in requests]

    def stats(self) -> dict[str, int]:
        return {"fake_batches": self.batches}

    def _answer(self, request: Request, size: int) -> Answer:
        text = str(request.values.get("text"))
        word, *more = text.split()
        if word == "sleep":
            time.sleep(float(more[0]))
        if text == "kill" or (text.startswith("kill once") and not Path(more[-1]).exists()):
            Path(more[-1] if more else "/dev/null").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "memory":
            return ResourceError(ResourceCode.HOST_MEMORY, "out of memory", where="/secret/path", fix="use a smaller --batch")
        if word == "raise":
            raise ZeroDivisionError("a bug in /secret/path")
        return {"label": text, "process": os.getpid(), "batch": size, "image": len(request.values.get("image") or b"")}


class Running:
    """A server as a process."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        line = self.wait_for_line(r"http://[\w.]+:(\d+)")
        self.port = int(re.search(r"http://[\w.]+:(\d+)", line)[1])  # type: ignore[index]
        self.url = f"http://127.0.0.1:{self.port}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def wait_for_line(self, pattern: str) -> str:
        return wait_for(lambda: next((line for line in self.lines if re.search(pattern, line)), ""), f"{pattern}\n{self.lines}")

    def wait_until_ready(self) -> None:
        wait_for(lambda: self.get("/ready").status_code == 200, "ready")

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/predict", json=body, timeout=PATIENCE)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=PATIENCE)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def workers(self) -> list[int]:
        """The processes that this one started."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(word) for word in found.split()]

    def metric(self, name: str) -> float:
        text = self.get("/metrics").text
        found = [float(line.split()[-1]) for line in text.splitlines() if re.match(rf"{name}(\{{| )", line)]
        assert found, f"there is no {name} in\n{text}"
        return sum(found)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited in vain for {what}")


@contextmanager
def running(command: Sequence[str], **environment: str) -> Iterator[Running]:
    server = Running(command, {"MOPEFUSE_API_KEY": "", **environment})
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait(PATIENCE)


@contextmanager
def fake_server(model: Path, key: str = "", **settings: Any) -> Iterator[Running]:
    """A server with workers that have the fake engine, ready to answer."""
    command = [sys.executable, __file__, "serve", str(model), json.dumps({"port": 0, **settings})]
    with running(command, MOPEFUSE_API_KEY=key) as server:
        server.wait_until_ready()
        yield server


def serve_with_fake_engine(model: str, settings: dict[str, Any]) -> None:
    from mopefuse.serving.engine.engine import EngineSettings
    from mopefuse.serving.server import serve
    from mopefuse.serving.server_settings import ServerSettings

    key = os.environ["MOPEFUSE_API_KEY"]
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    try:
        serve(EngineSettings((f"m={model}",)), ServerSettings(**{**settings, **lists}, api_key=key), WORKER)
    except MopefuseError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve_with_fake_engine(sys.argv[2], json.loads(sys.argv[3]))
    else:
        from mopefuse.serving.workers.worker import serve as serve_worker

        serve_worker(socket.socket(fileno=int(sys.argv[1])), FakeEngine)
