"""The processes of a deployment on Ray Serve that hold the models, and how the HTTP interface reaches them.

Rows travel in calls of at most `max_batch` rows, which a replica collects into batches. A call is sent again if the replica
that had it died.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from mopefuse.core.error_codes import RequestCode
from mopefuse.errors import MopefuseError, RequestError
from mopefuse.serving.engine.engine import Engine, EngineSettings
from mopefuse.serving.engine.request import Request
from mopefuse.serving.workers import frames
from mopefuse.serving.workers.batching import Served

_TRIES = 3  # replicas that may die with one call, as with the workers of `mopefuse serve`
_PAUSE = 0.2  # seconds before the second try, for Ray to notice that the replica died
_STUCK_AFTER = 300.0  # seconds for one batch, after which a replica is replaced
_LONGEST_RETRY = 60  # seconds


class Reply(NamedTuple):
    """What a replica returns for a call.

    Attributes:
        answers: see `mopefuse.serving.workers.frames.answer_to_json`. batch: rows of the batch. seconds: time to compute it.
        is_first: whether this is the first call of its batch.
    """

    answers: list[dict[str, Any]]
    batch: int
    seconds: float
    is_first: bool


class Replica:
    """Holds an engine, and answers calls in batches.

    Raises:
        RuntimeError: the models cannot be loaded.
    """

    def __init__(self, settings: Mapping[str, Any], max_batch: int, max_wait: float) -> None:
        os.environ.setdefault("MOPEFUSE_FLUSH_DENORMALS", "1")  # see mopefuse.core.device
        self._began: float | None = None
        batched: Any = self.predict
        batched.set_max_batch_size(max_batch)
        batched.set_batch_wait_timeout_s(max_wait)
        try:
            self._engine = Engine(EngineSettings(**{**settings, "models": tuple(settings["models"])}))
            self._engine.load()
        except MopefuseError as error:
            raise RuntimeError(f"error[{error.code}]: {error}") from None

    @serve.batch(batch_size_fn=lambda calls: sum(map(len, calls)))
    async def predict(self, calls: list[list[Request]]) -> list[Reply]:
        """The answers to the requests of each call; all calls are one batch."""
        requests = [request for call in calls for request in call]
        self._began = began = time.monotonic()
        try:
            answers = iter(await asyncio.to_thread(self._engine.predict, requests))
        finally:
            self._began = None
        seconds = time.monotonic() - began
        return [
            Reply([frames.answer_to_json(next(answers)) for _ in call], len(requests), seconds, number == 0)
            for number, call in enumerate(calls)
        ]

    async def is_ready(self) -> bool:
        """Whether the models are loaded: a replica that can be called has loaded them."""
        return True

    async def check_health(self) -> None:
        """Called by Ray, which replaces a replica that fails.

        Raises:
            RuntimeError: a batch takes too long.
        """
        if self._began is not None and time.monotonic() - self._began > _STUCK_AFTER:
            raise RuntimeError(f"a batch has been computed for more than {_STUCK_AFTER:g} seconds")


class RayPredictor:
    """Sends requests to replicas; see `mopefuse.serving.workers.batching.Predictor`.

    Args:
        replicas: the deployment. max_batch: rows of one call. timeout: seconds until a request is given up.

    Attributes:
        on_batch: called with the size of a batch and the seconds that it took.
    """

    def __init__(self, replicas: DeploymentHandle[Any], *, max_batch: int, timeout: float) -> None:
        self._replicas, self._max_batch, self._timeout = replicas, max_batch, timeout
        self._waiting, self._latency, self._is_ready = 0, 0.0, False
        self.on_batch: Callable[[int, float], None] = lambda size, seconds: None

    async def predict(self, requests: Sequence[Request]) -> list[Served]:
        """The answers, in order.

        Raises:
            RequestError: the queue is full, or there is no replica.
        """
        calls = [self._in_time(requests[at : at + self._max_batch]) for at in range(0, len(requests), self._max_batch)]
        self._waiting += len(requests)
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            return [one for served in await asyncio.gather(*tasks) for one in served]
        finally:
            self._waiting -= len(requests)
            for task in tasks:
                task.cancel()

    async def _in_time(self, requests: Sequence[Request]) -> list[Served]:
        try:
            return await asyncio.wait_for(self._call(requests), self._timeout)
        except asyncio.TimeoutError:
            what = f"no answer within {self._timeout:g} seconds"
            late = RequestError(RequestCode.TIMED_OUT, what, fix="send it again later, or deploy it with a longer timeout")
            return [Served(late, self._timeout, 0)] * len(requests)

    async def _call(self, requests: Sequence[Request]) -> list[Served]:
        for number in range(_TRIES):
            await asyncio.sleep(_PAUSE * number)
            began = time.monotonic()
            response = self._replicas.predict.remote(list(requests))
            try:
                reply: Reply = await response
            except BackPressureError:
                raise self._full() from None
            except DeploymentUnavailableError:
                break
            except RayActorError:  # the replica died
                continue
            except asyncio.CancelledError:
                response.cancel()  # type: ignore[no-untyped-call]
                raise
            return list(self._served(reply, time.monotonic() - began))
        what, fix = "the process that computed the request died, each time it was tried", "see the log of the replicas"
        lost = RequestError(RequestCode.WORKER_LOST, what, fix=fix)
        return [Served(lost, 0.0, 0)] * len(requests)

    def _served(self, reply: Reply, seconds: float) -> Iterator[Served]:
        self._latency, self._is_ready = seconds, True
        if reply.is_first:
            self.on_batch(reply.batch, reply.seconds)
        for answer in reply.answers:
            yield Served(frames.answer_from_json(answer), max(seconds - reply.seconds, 0.0), reply.batch)

    def is_ready(self) -> bool:
        """Whether a replica has loaded its models."""
        return self._is_ready

    async def wait_until_ready(self) -> None:
        """Wait for the first replica."""
        while not self._is_ready:
            try:
                self._is_ready = await self._replicas.is_ready.remote()
            except (RayActorError, BackPressureError, DeploymentUnavailableError):
                await asyncio.sleep(1)

    def retry_after(self) -> int:
        """Seconds until a request that is refused now would be accepted: how long an accepted one waited."""
        return max(1, min(_LONGEST_RETRY, math.ceil(self._latency)))

    def stats(self) -> dict[str, float]:
        """Gauges for monitoring, by name."""
        return {"requests_unfinished": self._waiting}

    def _full(self) -> RequestError:
        fix = "send it again later, or deploy more replicas"
        return RequestError(RequestCode.QUEUE_FULL, "the queue of the replicas is full", fix=fix)
