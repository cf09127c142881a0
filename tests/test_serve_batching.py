"""Batching and worker processes, without HTTP: what is predicted together, and what happens if a worker dies."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from serving_cases import WORKER, wait_for

from mopefuse.core.error_codes import RequestCode, ResourceCode
from mopefuse.errors import ConfigError, DataError, MopefuseError, RequestError
from mopefuse.serving.engine.request import Request
from mopefuse.serving.workers import frames
from mopefuse.serving.workers.batching import Batcher, Pending, Served
from mopefuse.serving.workers.worker_pool import WorkerPool


def ask(text: str) -> Request:
    return Request("m", {"text": text, "image": None})


def with_pool(
    work: Callable[[Batcher, WorkerPool], Awaitable[Any]], count: int = 1, settings: dict[str, Any] | None = None, **how: Any
) -> Any:
    """Run a test with real worker processes."""

    async def main() -> Any:
        pool = WorkerPool(settings or {}, count, WORKER, **{name: how.pop(name) for name in ("stuck_after",) if name in how})
        batcher = Batcher(pool, **{"max_batch": 4, "max_wait": 0.02, "queue": 100, "timeout": 60, **how})
        pool.begin()
        try:
            return await asyncio.wait_for(work(batcher, pool), 120)
        finally:
            await pool.close()

    return asyncio.run(main())


def labels(found: list[Served]) -> list[Any]:
    return [one.answer["label"] if isinstance(one.answer, dict) else one.answer.code for one in found]


class InstantWorkers:
    """Workers that answer when told to; `idle` is how many batches they would take."""

    def __init__(self, idle: int = 1) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.idle, self.batches = idle, list[list[Pending]]()

    def can_start(self, *, full: bool) -> bool:
        return self.idle > 0 or (full and self.idle > -1)

    def start(self, batch: list[Pending]) -> None:
        self.idle -= 1
        self.batches.append(batch)

    def finish(self) -> None:
        for one in self.batches[-1]:
            one.answer({"label": one.request.values["text"]})
        self.idle += 1
        self.on_change()

    def is_ready(self) -> bool:
        return True

    def stats(self) -> dict[str, float]:
        return {}


def with_instant_workers(work: Callable[[Batcher, InstantWorkers], Awaitable[Any]], idle: int = 1, **how: Any) -> Any:
    async def main() -> Any:
        workers = InstantWorkers(idle)
        return await work(Batcher(workers, **{"max_batch": 4, "max_wait": 30, "queue": 6, "timeout": 60, **how}), workers)

    return asyncio.run(main())


async def started(batcher: Batcher, *texts: str) -> list[asyncio.Task[list[Served]]]:
    tasks = [asyncio.ensure_future(batcher.predict([ask(text)])) for text in texts]
    await asyncio.sleep(0)
    return tasks


# -- frames


def test_a_batch_and_its_answers_survive_the_way_to_a_worker_and_back() -> None:
    requests = [
        Request("a", {"text": "é\ud800", "image": b"\0\xff" * 9, "sound": None}, top=3, routing=True),
        Request("b", {"image": b""}),
    ]
    content = b"".join(frames.pack_requests(7, requests))
    stream = io.BytesIO(content)
    frame = frames.read_frame(stream.read)
    assert frame is not None and frame[0]["number"] == 7
    assert frames.unpack_requests(frame) == requests
    assert frames.read_frame(stream.read) is None


@pytest.mark.parametrize("error", [ConfigError(3, "a"), DataError(12, "what", where="w", fix="f"), RequestError(3, "x")])
def test_an_error_survives_the_way_from_a_worker(error: MopefuseError) -> None:
    found = frames.answer_from_json(frames.answer_to_json(error))
    assert type(found) is type(error)
    assert isinstance(found, MopefuseError) and found.as_dict() == error.as_dict()


# -- batches


def test_a_batch_starts_when_it_is_full() -> None:
    async def work(batcher: Batcher, workers: InstantWorkers) -> None:
        await started(batcher, "a", "b", "c")
        assert workers.batches == []
        await started(batcher, "d")
        assert [one.request.values["text"] for one in workers.batches[0]] == ["a", "b", "c", "d"]

    with_instant_workers(work)


def test_a_batch_that_is_not_full_starts_after_the_longest_wait() -> None:
    async def work(batcher: Batcher, workers: InstantWorkers) -> None:
        began = time.monotonic()
        await started(batcher, "a")
        await asyncio.sleep(0.02)
        await started(batcher, "b")
        while not workers.batches:
            await asyncio.sleep(0.005)
        assert 0.1 <= time.monotonic() - began < 1.0, "counted from the first request"
        assert len(workers.batches[0]) == 2

    with_instant_workers(work, max_wait=0.1)


def test_nothing_waits_for_connections_that_do_not_exist() -> None:
    async def work(batcher: Batcher, workers: InstantWorkers) -> None:
        batcher.count_connections = lambda: 2
        await started(batcher, "a")
        await asyncio.sleep(0.05)
        assert workers.batches == [], "the second connection could send something"
        await started(batcher, "b")
        assert len(workers.batches) == 1

    with_instant_workers(work)


def test_requests_are_collected_while_the_workers_are_busy() -> None:
    async def work(batcher: Batcher, workers: InstantWorkers) -> None:
        await started(batcher, "a", "b", "c", "d")
        await started(batcher, "e", "f", "g")
        await asyncio.sleep(0.05)
        assert len(workers.batches) == 1, "the next one is given to a busy worker only if it is full"
        await started(batcher, "h")
        assert len(workers.batches) == 2

    with_instant_workers(work, max_wait=0.001)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def work(batcher: Batcher, workers: InstantWorkers) -> None:
        workers.idle = -9
        tasks = await started(batcher, *"abcdef")
        with pytest.raises(RequestError) as refused:
            await batcher.predict([ask("g")])
        assert refused.value.code == RequestCode.QUEUE_FULL.text
        assert batcher.retry_after() == 1
        tasks[0].cancel()
        await asyncio.sleep(0.01)
        await started(batcher, "h")
        assert batcher.stats()["queue_length"] == 6, "a request that was dropped frees its place"

    with_instant_workers(work)


def test_retry_after_is_the_time_that_the_queue_takes_at_the_measured_rate() -> None:
    async def work(batcher: Batcher, workers: InstantWorkers) -> None:
        for _ in range(2):
            task = await started(batcher, *"abcd")
            workers.finish()
            await asyncio.gather(*task)
        workers.idle = -9
        await started(batcher, *map(str, range(40)))
        assert batcher.retry_after() == 5, "40 requests, of which 8 were answered in the first second"

    with_instant_workers(work, queue=100)


def test_a_request_that_waited_too_long_is_not_computed() -> None:
    async def work(batcher: Batcher, workers: InstantWorkers) -> None:
        workers.idle = -9
        (late,) = await batcher.predict([ask("a")])
        assert isinstance(late.answer, RequestError) and late.answer.code == RequestCode.TIMED_OUT.text
        task = await started(batcher, "b")
        workers.idle = 1
        workers.on_change()
        assert [one.request.values["text"] for one in workers.batches[0]] == ["b"]
        workers.finish()
        await asyncio.gather(*task)
        await batcher.finish()

    with_instant_workers(work, timeout=0.05, max_wait=0)


def test_dropped_requests_hold_no_memory() -> None:
    async def work(batcher: Batcher, workers: InstantWorkers) -> None:
        workers.idle = -9
        await started(batcher, "first")
        for _ in range(50):
            for task in await started(batcher, *"abc"):
                task.cancel()
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert batcher.stats()["queue_length"] == 1
        assert len(batcher._queue) <= 6

    with_instant_workers(work, queue=1000)


# -- workers


def test_workers_answer_in_order_and_share_the_batches() -> None:
    async def work(batcher: Batcher, pool: WorkerPool) -> None:
        while sum(worker.is_ready for worker in pool._workers) < 2:
            await asyncio.sleep(0.02)
        texts = [f"sleep 0.0{number % 3}" for number in range(24)]
        found = await batcher.predict([ask(text) for text in texts])
        assert labels(found) == texts
        assert len({one.answer["process"] for one in found if isinstance(one.answer, dict)}) == 2
        assert {one.batch for one in found} == {4}
        assert pool.stats() == {"fake_batches": 6, "workers_ready": 2, "worker_restarts": 0}

    with_pool(work, count=2)


def test_a_batch_whose_worker_dies_is_computed_again(tmp_path: Path) -> None:
    async def work(batcher: Batcher, pool: WorkerPool) -> None:
        texts = [f"kill once {tmp_path / 'marker'}", "a", "b", "c", "d", "e", "f", "g", "h"]
        assert labels(await batcher.predict(list(map(ask, texts)))) == texts
        assert pool.restarts == 1

    with_pool(work)


def test_only_the_request_that_kills_workers_is_given_up() -> None:
    async def work(batcher: Batcher, pool: WorkerPool) -> None:
        found = await batcher.predict(list(map(ask, ["a", "kill", "b", "c", "d", "e"])))
        assert labels(found) == ["a", RequestCode.WORKER_LOST.text, "b", "c", "d", "e"]
        assert pool.restarts == 3
        assert labels(await batcher.predict([ask("f")])) == ["f"]

    with_pool(work)


@pytest.mark.process
def test_a_worker_that_hangs_is_restarted() -> None:
    async def work(batcher: Batcher, pool: WorkerPool) -> None:
        found = await batcher.predict([ask("sleep 600")])
        assert labels(found) == [RequestCode.WORKER_LOST.text]
        assert labels(await batcher.predict([ask("a")])) == ["a"]

    with_pool(work, stuck_after=0.3)


def test_an_error_of_the_engine_is_the_answer() -> None:
    async def work(batcher: Batcher, pool: WorkerPool) -> None:
        found = await batcher.predict([ask("memory"), ask("a")])
        assert labels(found) == [ResourceCode.HOST_MEMORY.text, "a"]
        found = await batcher.predict([ask("raise")])
        assert labels(found) == [RequestCode.SERVER_FAILED.text]
        assert pool.restarts == 0

    with_pool(work)


@pytest.mark.parametrize(
    ("settings", "code"), [({"fails": True}, ResourceCode.HOST_MEMORY.text), ({"dies": True}, RequestCode.WORKER_LOST.text)]
)
def test_a_worker_that_cannot_load_ends_the_server(settings: dict[str, Any], code: str) -> None:
    async def work(batcher: Batcher, pool: WorkerPool) -> None:
        assert (await pool.failure).code == code
        assert not pool.is_ready()

    with_pool(work, settings=settings)


def test_a_worker_ends_with_the_server_even_while_it_computes() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        worker = subprocess.Popen([*WORKER, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    for piece in [*frames.pack({"settings": {}}), *frames.pack_requests(1, [ask("sleep 600")])]:
        ours.sendall(piece)
    assert frames.read_frame(ours.makefile("rb").read) == ({"kind": "ready", "stats": {"fake_batches": 0}}, [])
    os.kill(worker.pid, signal.SIGTERM)
    time.sleep(0.2)
    assert worker.poll() is None, "a signal to all processes is for the server to handle"
    ours.shutdown(socket.SHUT_RDWR)
    ours.close()
    wait_for(lambda: worker.poll() is not None, "the end of the worker")
