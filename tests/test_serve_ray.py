"""The server on Ray Serve: its settings, what becomes of calls to replicas that die, and a small deployment on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from serving_cases import encoded, png, wait_for
from test_shared_pair import SHARED, assert_equal, expected, samples, save

from mopefuse.errors import ConfigError, MopefuseError, PackageError, RequestError
from mopefuse.serving.engine.engine import Engine, EngineSettings
from mopefuse.serving.engine.request import Request
from mopefuse.serving.http.app import create_app
from mopefuse.serving.ray import app, build
from mopefuse.serving.ray_settings import read_settings
from mopefuse.serving.server_settings import ServerSettings
from mopefuse.serving.workers.batching import Served

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # those of Ray
# Ray reads these when it is imported
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
pytest.importorskip("ray")
NAMES = ("default", "experts", "late-concat")
KEY = "a key"


# -- settings


def test_settings_come_as_texts() -> None:
    autoscaling = '{"min_replicas": 1, "max_replicas": 4}'
    given = {"models": "a, b=runs/x", "max_batch": "8", "num_gpus": "0.5", "autoscaling": autoscaling, "cors": "https://a"}
    settings = read_settings(given, "serve run")
    assert settings.engine().models == ("a", "b=runs/x") and settings.server("key").cors == ("https://a",)
    options = settings.replica_options()
    assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.5} and options["max_ongoing_requests"] == 16
    assert options["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 4} and "num_replicas" not in options


def test_settings_mean_what_they_mean_for_the_server_on_one_machine() -> None:
    settings = read_settings({}, "serve run")
    assert settings.server("") == ServerSettings()
    assert settings.engine() == EngineSettings()


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    settings = read_settings({"models": "one,two=one,hf-hub:some/name", "adapters": "more"}, "serve run").engine()
    assert settings.models == (str(tmp_path / "one"), f"two={tmp_path / 'one'}", "hf-hub:some/name")
    assert settings.adapters == str(tmp_path / "more")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replica": "2"}, r"unknown setting replica \(did you mean replicas"),
        ({"replicas": "0"}, "replicas: got '0'; needs more than 0"),
        ({"autoscaling": "{"}, "needs an object of JSON"),
    ],
)
def test_a_wrong_setting_is_an_error_with_a_fix(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        app(given)
    assert caught.value.where == "serve run" and caught.value.fix


def test_errors_of_serve_run_are_one_line() -> None:
    import click

    command = click.Context(click.Command("run"))
    with command.scope(), pytest.raises(click.ClickException, match=r"\[MF-REQ-22\] no model was given"):
        app({})


def test_ray_checks_its_own_settings(folder: Path) -> None:
    with pytest.raises(ConfigError, match="max_replicas"):
        build(adapters=str(folder), autoscaling={"min_replicas": 3, "max_replicas": 1})


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PackageError, match=r'pip install "mopefuse\[ray\]"'):
        build(models="x")


# -- calls to replicas, without Ray


class Replicas:
    """Stands in for the handle of a deployment: each call has the next of some outcomes, the last one for ever."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes, self.calls, self.cancelled = list(outcomes), [], 0
        self.predict = self

    def remote(self, requests: list[Request]) -> Any:
        self.calls.append([request.model for request in requests])
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        return _Response(self, requests, outcome)


class _Response:
    def __init__(self, replicas: Replicas, requests: Sequence[Request], outcome: Any) -> None:
        self.replicas, self.requests, self.outcome = replicas, requests, outcome

    def __await__(self) -> Any:
        return self._run().__await__()

    async def _run(self) -> Any:
        from mopefuse.serving.ray_replicas import Reply

        if isinstance(self.outcome, Exception):
            raise self.outcome
        await asyncio.sleep(self.outcome)
        return Reply([{"prediction": {"label": one.model}} for one in self.requests], len(self.requests), 0.0, True)

    def cancel(self) -> None:
        self.replicas.cancelled += 1


def predict(replicas: Replicas, count: int, **settings: Any) -> list[Served]:
    from mopefuse.serving.ray_replicas import RayPredictor

    predictor = RayPredictor(replicas, **{"max_batch": 2, "timeout": 30.0, **settings})  # type: ignore[arg-type]
    sizes: list[int] = []
    predictor.on_batch = lambda size, _: sizes.append(size)
    served = asyncio.run(predictor.predict([Request(str(number), {}) for number in range(count)]))
    assert predictor.stats() == {"requests_unfinished": 0}
    assert sum(sizes) == sum(not isinstance(one.answer, MopefuseError) for one in served)
    return served


def test_rows_travel_in_calls_of_at_most_one_batch() -> None:
    replicas = Replicas(0.0)
    assert [one.answer for one in predict(replicas, 5)] == [{"label": str(number)} for number in range(5)]
    assert replicas.calls == [["0", "1"], ["2", "3"], ["4"]]


def test_a_call_is_sent_again_if_its_replica_died() -> None:
    from ray.exceptions import ActorDiedError, ActorUnavailableError

    replicas = Replicas(ActorDiedError(), ActorUnavailableError("gone", None), 0.0)
    assert [one.answer for one in predict(replicas, 2)] == [{"label": "0"}, {"label": "1"}]
    assert replicas.calls == [["0", "1"]] * 3


def test_a_call_that_kills_replicas_is_given_up() -> None:
    from ray.exceptions import ActorDiedError

    replicas = Replicas(ActorDiedError())
    (served,) = predict(replicas, 1)
    assert isinstance(served.answer, RequestError) and served.answer.code == "MF-REQ-09" and len(replicas.calls) == 3


def test_a_full_queue_refuses_the_request() -> None:
    from ray.serve.exceptions import BackPressureError

    with pytest.raises(RequestError, match="queue of the replicas is full") as caught:
        predict(Replicas(0.0, BackPressureError(1, 1)), 4)
    assert caught.value.code == "MF-REQ-07"


def test_a_late_call_is_cancelled() -> None:
    replicas = Replicas(60.0)
    (served,) = predict(replicas, 1, timeout=0.05)
    assert isinstance(served.answer, RequestError) and served.answer.code == "MF-REQ-10" and replicas.cancelled == 1


# -- a deployment on this machine


class Deployment(NamedTuple):
    url: str
    folder: Path

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, headers={"X-API-Key": KEY}, timeout=60, **options)

    def post(self, body: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(f"{self.url}/predict", content=content, headers={"X-API-Key": KEY}, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("adapters")
    save(where, {name: {**SHARED, "late-concat": {"method": "late-concat"}}[name] for name in NAMES})
    return where


@pytest.fixture(scope="module")
def deployed(folder: Path) -> Iterator[Deployment]:
    """Two replicas on one node; its processes end with this one, whatever happens."""
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as free:
        patch.setenv("MOPEFUSE_API_KEY", KEY)
        port = free.getsockname()[1]
        free.close()
        import ray
        from ray import serve

        try:
            small = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_dashboard": False, "log_to_driver": False}
            ray.init(**small, _node_ip_address=_LOOPBACK if sys.platform == "linux" else None)
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(build(adapters=str(folder), replicas=2, device="cpu", max_rows=12), name=_APPLICATION)
            yield Deployment(f"http://127.0.0.1:{port}", folder)
        finally:
            with suppress(Exception):
                serve.shutdown()
            ray.shutdown()
    wait_for(lambda: not processes("models"), "the end of the replicas")


_APPLICATION = f"test-{os.getpid()}"
_LOOPBACK = "127.0.0.2"  # Ray replaces 127.0.0.1 by an address that others can reach


def processes(deployment: str) -> set[int]:
    """The processes of a deployment."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(f"ray::ServeReplica:{_APPLICATION}:{deployment}".encode()):
                found.add(int(folder.name))
    return found


def body_of(request: Request) -> dict[str, Any]:
    image, text = request.values["image"], request.values["text"]
    assert isinstance(image, bytes)
    return {"model": request.model, "text": text, "image": encoded(image), "routing": request.routing}


@pytest.mark.process
def test_a_killed_replica_loses_no_request_and_is_replaced(deployed: Deployment) -> None:
    requests = samples(NAMES, each=4)
    wanted = [expected(deployed.folder, request) for request in requests]
    before = processes("models")
    victim = min(before)
    assert len(before) == 2

    def ask(number: int) -> httpx.Response:
        if number == 30:
            kill_at_work(victim)
        return deployed.post({"rows": [body_of(request) for request in requests]})

    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(ask, range(60)))
    for response in responses:
        assert response.status_code == 200, response.text
        for answer, request, one in zip(response.json()["predictions"], requests, wanted, strict=True):
            assert answer.pop("model") == request.model
            assert_equal(answer, one)
    assert victim not in processes("models")
    wait_for(lambda: len(processes("models") - {victim}) == 2, "a new replica")


def kill_at_work(process: int) -> None:
    """Kill a process while it computes a batch: one thread of it is running."""

    def is_working() -> bool:
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{process}/task").iterdir()]
        return "R" in states

    wait_for(is_working, "a batch")
    os.kill(process, signal.SIGKILL)


@pytest.mark.process
def test_the_interface_is_that_of_the_server_on_one_machine(deployed: Deployment) -> None:
    engine = EngineSettings(adapters=str(deployed.folder), device="cpu")
    here = create_app(engine.catalogue(), _InProcess(engine), ServerSettings(max_rows=12, api_key=KEY), log=lambda record: None)
    image = encoded(png())
    rows = [{"model": "default", "text": "read it", "image": image, "id": 7}, {"model": "experts", "text": "x"}, 3]
    bodies = [{"rows": rows}, {"model": "expert", "text": "x"}, {"text": "x"}, {"rows": [{}] * 13}, b"{", b"x" * (21 * 2**20)]
    asked: list[tuple[str, str, Any, dict[str, str]]] = [("POST", "/predict", body, {"X-API-Key": KEY}) for body in bodies]
    asked += [("GET", path, None, {"X-API-Key": KEY}) for path in ("/models", "/models/default", "/models/x", "/health", "/x")]
    asked += [("POST", "/predict", {}, {}), ("GET", "/ready", None, {}), ("GET", "/openapi.json", None, {})]
    for there, wanted in zip(_send(asked, deployed.url), _send(asked, "http://here", here), strict=True):
        assert (there.status_code, there.headers["content-type"]) == (wanted.status_code, wanted.headers["content-type"])
        assert _without_id(there) == _without_id(wanted)
        assert there.headers.get_list("x-request-id") == ["an-id"]
    assert 'mopefuse_rows_total{model="default",status="200"}' in deployed.get("/metrics").text


class _InProcess:
    """Predicts in this process."""

    def __init__(self, settings: EngineSettings) -> None:
        self._engine = Engine(settings)

    async def predict(self, requests: Sequence[Request]) -> list[Served]:
        return [Served(answer, 0.0, 1) for answer in self._engine.predict(requests)]

    def is_ready(self) -> bool:
        return True

    def retry_after(self) -> int:
        return 1

    def stats(self) -> dict[str, float]:
        return {}


def _send(asked: Sequence[tuple[str, str, Any, dict[str, str]]], url: str, to: Any = None) -> list[httpx.Response]:
    async def send() -> list[httpx.Response]:
        transport = None if to is None else httpx.ASGITransport(to)
        async with httpx.AsyncClient(base_url=url, transport=transport, timeout=60) as client:
            found = []
            for method, path, body, headers in asked:
                content = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
                found.append(await client.request(method, path, content=content, headers={**headers, "X-Request-ID": "an-id"}))
            return found

    return asyncio.run(send())


def _without_id(response: httpx.Response) -> Any:
    body = response.json()
    return {name: value for name, value in body.items() if name != "request_id"}
