"""Dynamic batching: requests of many clients, for any models, are predicted together.

A batch is started when a worker is idle and the batch is full, its first request has waited `max_wait_ms`, or no open
connection could add to it. While a worker computes, it is given one more batch, but only a full one: until then requests are
collected. So batches grow with the load, and a single client does not wait.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

from mopefuse.core.error_codes import RequestCode
from mopefuse.errors import RequestError
from mopefuse.serving.engine.request import Answer, Request

_LONGEST_RETRY = 60  # seconds


class Served(NamedTuple):
    """An answer and how it came about.

    Attributes:
        queued: seconds until its batch was started. batch: requests in that batch.
    """

    answer: Answer
    queued: float
    batch: int


class Predictor(Protocol):
    """Answers requests; what the HTTP interface needs of whatever computes."""

    async def predict(self, requests: Sequence[Request]) -> list[Served]:
        """The answers, in order.

        Raises:
            RequestError: the queue is full, or the time is up.
        """

    def is_ready(self) -> bool:
        """Whether a request would be computed at once."""

    def retry_after(self) -> int:
        """Seconds after which to send a request again that was refused because the queue is full."""

    def stats(self) -> dict[str, float]:
        """Gauges for monitoring, by name."""


@dataclass(eq=False)
class Pending:
    """One accepted request. Nobody waits for it any more if its future is cancelled.

    Attributes:
        accepted, started: when it was accepted, and when its batch was started; monotonic, in seconds.
        batch: requests in its batch.
    """

    request: Request
    future: asyncio.Future[Answer]
    accepted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    batch: int = 0

    def answer(self, answer: Answer) -> None:
        """Set the answer, unless nobody waits for it."""
        if not self.future.done():
            self.future.set_result(answer)

    def served(self) -> Served:
        """The answer; only after it was set."""
        return Served(self.future.result(), max(self.started - self.accepted, 0.0), self.batch)


class Workers(Protocol):
    """What computes batches; see `mopefuse.serving.workers.worker_pool.WorkerPool`."""

    on_change: Callable[[], None]

    def can_start(self, *, full: bool) -> bool:
        """Whether a batch can be given to a worker; one that is not full only to an idle one."""

    def start(self, batch: list[Pending]) -> None:
        """Give a batch to a worker, which sets the answers."""

    def is_ready(self) -> bool:
        """Whether a worker has loaded its models."""

    def stats(self) -> dict[str, float]:
        """Gauges for monitoring, by name."""


class Batcher:
    """Collects requests into batches for workers; belongs to one event loop.

    Args:
        queue, max_batch, max_wait, timeout: see `mopefuse.serving.server_settings.ServerSettings`; in seconds.

    Attributes:
        count_connections: counts the connections of clients; None if that is unknown, and there may be any number.
    """

    def __init__(
        self,
        workers: Workers,
        *,
        max_batch: int,
        max_wait: float,
        queue: int,
        timeout: float,
    ) -> None:
        self._workers = workers
        self.count_connections: Callable[[], int] | None = None
        self._calls = 0  # of `predict`, each of which occupies a connection
        self._max_batch, self._max_wait, self._limit, self._timeout = max_batch, max_wait, queue, timeout
        self._queue: deque[Pending] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._queued, self._unfinished = 0, 0  # without those that were dropped
        self._rate = _Rate()
        self._idle = asyncio.Event()
        self._idle.set()
        workers.on_change = self._pump

    async def predict(self, requests: Sequence[Request]) -> list[Served]:
        """See `Predictor.predict`. Cancelling it drops requests that are not computed yet."""
        if self._queued and self._queued + len(requests) > self._limit:
            raise self._full()
        loop = asyncio.get_running_loop()
        pending = [Pending(request, loop.create_future()) for request in requests]
        self._unfinished += len(pending)
        self._queued += len(pending)
        self._idle.clear()
        for one in pending:
            one.future.add_done_callback(partial(self._finished, one))
        self._queue.extend(pending)
        _, late = await self._wait([one.future for one in pending])
        for one in pending:
            if one.future in late:
                one.answer(self._late())
        return [one.served() for one in pending]

    async def _wait(self, futures: list[asyncio.Future[Answer]]) -> tuple[set[Any], set[Any]]:
        """See `asyncio.wait`."""
        self._calls += 1
        self._pump()
        try:
            return await asyncio.wait(futures, timeout=self._timeout)
        except asyncio.CancelledError:
            for future in futures:
                future.cancel()
            raise
        finally:
            self._calls -= 1

    def is_ready(self) -> bool:
        """See `Predictor.is_ready`."""
        return self._workers.is_ready()

    def stats(self) -> dict[str, float]:
        """See `Predictor.stats`."""
        return {**self._workers.stats(), "queue_length": self._queued, "requests_unfinished": self._unfinished}

    def retry_after(self) -> int:
        """Seconds until a request that is refused now would probably be accepted, from the measured rate of answers."""
        rate = self._rate.per_second()
        seconds = self._queued / rate if rate else 1.0
        return max(1, min(_LONGEST_RETRY, math.ceil(seconds)))

    async def finish(self) -> None:
        """Wait until every accepted request was answered."""
        await self._idle.wait()

    def _finished(self, one: Pending, future: asyncio.Future[Answer]) -> None:
        self._unfinished -= 1
        if not one.batch:  # dropped, or given up; what it holds is freed soon
            self._queued -= 1
            if len(self._queue) > 2 * self._queued:
                self._queue = deque(one for one in self._queue if not one.future.done())
        if not future.cancelled():
            self._rate.count()
        if not self._unfinished:
            self._idle.set()

    def _pump(self) -> None:
        """Start all batches that can be started now, and see to it that the next one is started in time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue:
            if self._queue[0].future.done():  # dropped, or given up
                self._queue.popleft()
                continue
            full = self._queued >= self._max_batch
            if not self._workers.can_start(full=full):
                return
            wait = self._queue[0].accepted + self._max_wait - time.monotonic()
            if not full and wait > 0 and self._may_get_more():
                self._timer = asyncio.get_running_loop().call_later(wait, self._pump)
                return
            self._start()

    def _may_get_more(self) -> bool:
        """Whether an open connection could send another request now."""
        return self.count_connections is None or self.count_connections() > self._calls

    def _start(self) -> None:
        batch: list[Pending] = []
        while self._queue and len(batch) < self._max_batch:
            one = self._queue.popleft()
            if not one.future.done():
                batch.append(one)
        now = time.monotonic()
        for one in batch:
            one.started, one.batch = now, len(batch)
        self._queued -= len(batch)
        if batch:
            self._workers.start(batch)

    def _full(self) -> RequestError:
        what = f"{self._queued} requests are waiting, and at most {self._limit} may"
        fix = "send it again later, or start the server with more --workers"
        return RequestError(RequestCode.QUEUE_FULL, what, fix=fix)

    def _late(self) -> RequestError:
        what = f"no answer within {self._timeout:g} seconds"
        fix = "send it again later, or start the server with a longer --timeout"
        return RequestError(RequestCode.TIMED_OUT, what, fix=fix)


class _Rate:
    """Events per second, over the last ten seconds or so."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int]] = deque(maxlen=10)

    def count(self) -> None:
        second = int(time.monotonic())
        before = self._seconds.pop() if self._seconds and self._seconds[-1][0] == second else (second, 0)
        self._seconds.append((second, before[1] + 1))

    def per_second(self) -> float:
        if not self._seconds:
            return 0.0
        lasted = time.monotonic() - self._seconds[0][0]
        return sum(count for _, count in self._seconds) / max(lasted, 1.0)
