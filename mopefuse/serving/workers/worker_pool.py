"""Worker processes: started, fed with batches, and started again if they die. Belongs to one event loop.

A batch that was being computed when its worker died is computed again by another worker, or by the same one once it is back.
If that kills a worker too, its requests are tried one by one, so that only the one that kills workers is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mopefuse.core.error_codes import RequestCode
from mopefuse.errors import MopefuseError, RequestError, error_from_dict
from mopefuse.serving.workers import frames
from mopefuse.serving.workers.batching import Pending

COMMAND = (sys.executable, "-m", "mopefuse.serving.workers.worker")
_IN_FLIGHT = 2  # batches of one worker: one is computed, the other is there when it ends
_DEATHS_WHILE_LOADING = 3  # in a row, until the server gives up
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds before a worker is started again
_STABLE = 30.0  # seconds after which a death is not counted together with the one before


@dataclass(eq=False)
class _Batch:
    """Requests that one worker computes together. Attributes: deaths: workers that died while they computed them."""

    requests: list[Pending]
    deaths: int = 0

    def waiting(self) -> list[Pending]:
        return [one for one in self.requests if not one.future.done()]


class WorkerPool:
    """Keeps `count` workers running.

    Args:
        settings: sent to each worker, for its engine. command: starts a worker; the number of a descriptor is added.
        stuck_after: seconds for one batch, after which its worker is killed.

    Attributes:
        on_change: called when a worker can take another batch. on_batch: called with the size of a batch and the seconds that
            it took. failure: set if no worker can be started any more, with the reason.
    """

    def __init__(
        self, settings: Mapping[str, Any], count: int, command: Sequence[str] = COMMAND, *, stuck_after: float = 300.0
    ) -> None:
        self.settings, self.command, self.stuck_after = settings, command, stuck_after
        self._workers = [_Worker(self) for _ in range(count)]
        self._retries: deque[_Batch] = deque()
        self._tasks: list[asyncio.Task[None]] = []
        self.on_change: Callable[[], None] = lambda: None
        self.on_batch: Callable[[int, float], None] = lambda size, seconds: None
        self.failure: asyncio.Future[MopefuseError] = asyncio.get_running_loop().create_future()
        self.restarts = 0

    def begin(self) -> None:
        """Start the workers, without waiting for them."""
        self._tasks = [asyncio.create_task(worker.run()) for worker in self._workers]

    async def close(self) -> None:
        """End the workers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def is_ready(self) -> bool:
        """Whether a worker has loaded its models."""
        return any(worker.is_ready for worker in self._workers)

    def stats(self) -> dict[str, float]:
        """Counts of the engines, summed over the workers, and of the workers themselves."""
        total: dict[str, float] = {}
        for worker in self._workers:
            for name, value in worker.stats.items():
                total[name] = total.get(name, 0) + value
        ready = sum(worker.is_ready for worker in self._workers)
        return {**total, "workers_ready": ready, "worker_restarts": self.restarts}

    def can_start(self, *, full: bool) -> bool:
        """See `mopefuse.serving.workers.batching.Workers.can_start`."""
        return not self._retries and self._free(_IN_FLIGHT if full else 1) is not None

    def start(self, batch: list[Pending]) -> None:
        """See `mopefuse.serving.workers.batching.Workers.start`; only after `can_start`."""
        self._retries.append(_Batch(batch))
        self._send_retries()

    def _free(self, in_flight: int) -> _Worker | None:
        """The least busy worker, if it has fewer than so many batches."""
        ready = [worker for worker in self._workers if worker.is_ready and len(worker.batches) < in_flight]
        return min(ready, key=lambda worker: len(worker.batches), default=None)

    def changed(self) -> None:
        """A worker can take a batch: those that are tried again come first."""
        self._send_retries()
        self.on_change()

    def _send_retries(self) -> None:
        while self._retries:
            batch = self._retries[0]
            batch.requests = batch.waiting()
            if not batch.requests:
                self._retries.popleft()
                continue
            worker = self._free(_IN_FLIGHT)
            if worker is None:
                return
            worker.send(self._retries.popleft())

    def died(self, batches: Sequence[_Batch]) -> None:
        """Take back the batches of a worker that died, of which it was computing the first."""
        again: list[_Batch] = []
        for batch in batches:
            batch.deaths += batch is batches[0]
            if batch.deaths == 2 and len(batch.requests) > 1:
                again += [_Batch([one], deaths=2) for one in batch.waiting()]
            elif batch.deaths < 3:
                again.append(batch)
            for one in batch.requests if batch.deaths == 3 else ():
                what, fix = "the process that computed the request died, each time it was tried", "see the log of the server"
                one.answer(RequestError(RequestCode.WORKER_LOST, what, fix=fix))
        self._retries.extendleft(reversed(again))
        self.changed()

    def cannot_load(self, error: MopefuseError) -> None:
        """A worker repeatedly failed to load: unless others work, the server has to end."""
        if not self.is_ready() and not self.failure.done():
            self.failure.set_result(error)


class _Worker:
    """One worker, through all processes that it has been."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self.is_ready = False
        self.batches: dict[int, _Batch] = {}
        self.stats: dict[str, float] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._number = 0

    async def run(self) -> None:
        """Start a process, again whenever it dies, until cancelled."""
        failures, pause = 0, _FIRST_PAUSE
        while True:
            began, error = time.monotonic(), await self._live()
            was_ready, self.is_ready, self.stats = self.is_ready, False, {}
            failures = 0 if was_ready else failures + 1
            pause = _FIRST_PAUSE if was_ready and time.monotonic() - began > _STABLE else min(2 * pause, _LONGEST_PAUSE)
            batches, self.batches = list(self.batches.values()), {}
            self._pool.died(batches)
            if error is not None or failures >= _DEATHS_WHILE_LOADING:
                self._pool.cannot_load(error or _died())
            self._pool.restarts += 1
            await asyncio.sleep(pause)

    async def _live(self) -> MopefuseError | None:
        """The life of one process. Returns what prevented it from loading, if it said so."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [*self._pool.command, str(theirs.fileno())]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()])
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        try:
            for piece in frames.pack({"settings": self._pool.settings}):
                self._writer.write(piece)
            return await self._listen(reader)
        finally:
            self._stop_watching()
            self._writer.transport.abort()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await asyncio.get_running_loop().run_in_executor(None, process.wait)

    async def _listen(self, reader: asyncio.StreamReader) -> MopefuseError | None:
        while True:
            try:
                header = await _read(reader)
            except (asyncio.IncompleteReadError, ConnectionError):
                return None
            if header["kind"] == "failed":
                return error_from_dict(header["error"])
            self.stats = header["stats"]
            if header["kind"] == "ready":
                self.is_ready = True
            else:
                self._answer(header)
            self._pool.changed()

    def send(self, batch: _Batch) -> None:
        """Give it a batch."""
        assert self._writer is not None
        self._number += 1
        self.batches[self._number] = batch
        if len(self.batches) == 1:
            self._start_watching()
        for piece in frames.pack_requests(self._number, [one.request for one in batch.requests]):
            self._writer.write(piece)

    def _answer(self, header: Mapping[str, Any]) -> None:
        batch = self.batches.pop(header["number"])
        self._stop_watching()
        if self.batches:
            self._start_watching()
        for one, answer in zip(batch.requests, header["answers"], strict=True):
            one.answer(frames.answer_from_json(answer))
        self._pool.on_batch(len(batch.requests), header["seconds"])

    def _start_watching(self) -> None:
        """End the process if the batch that it starts takes too long; then it is treated like one that died."""
        assert self._writer is not None
        self._watch = asyncio.get_running_loop().call_later(self._pool.stuck_after, self._writer.transport.abort)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None


async def _read(reader: asyncio.StreamReader) -> dict[str, Any]:
    """A frame without parts."""
    length, _ = frames.PREFIX.unpack(await reader.readexactly(frames.PREFIX.size))
    header: dict[str, Any] = json.loads(await reader.readexactly(length))
    return header


def _died() -> RequestError:
    what = "the worker process died while it loaded the models, several times"
    return RequestError(RequestCode.WORKER_LOST, what, fix="see its messages above; memory may be short")
