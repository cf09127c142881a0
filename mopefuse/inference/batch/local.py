"""Predict partitions in worker processes of this machine, each with the model; one that dies is started again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from mopefuse.core.dependencies import convert_error
from mopefuse.core.error_codes import ResourceCode
from mopefuse.core.stop_request import StopRequest
from mopefuse.errors import MopefuseError, ResourceError, error_from_dict
from mopefuse.inference.batch.job import Job
from mopefuse.inference.batch.output import Record
from mopefuse.inference.batch.plan import Partition

_MOST_DEATHS = 3  # of workers with one partition, or while they load the model
_POLL = 0.5  # seconds between looks at the signals

Outcome = Record | tuple[Partition, MopefuseError]
"""A complete partition, or one that failed, and why."""


@dataclass(eq=False)
class _Worker:
    device: str
    process: Any = None
    connection: Connection | None = None
    partition: Partition | None = None
    is_ready: bool = False
    deaths_while_loading: int = field(default=0)


def devices_for(device: str, workers: int | None) -> list[str]:
    """The device of each worker: one for each GPU, or one on the CPU, unless `workers` says how many."""
    count = 0
    if device in ("auto", "cuda"):
        with suppress(ImportError):  # a bundle needs no torch
            import torch

            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        return [f"cuda:{number % count}" for number in range(workers or count)]
    return [device] * (workers or 1)


def run(
    job: Job, partitions: Sequence[Partition], devices: Sequence[str], stop: StopRequest, on_rows: Callable[[int], None]
) -> Iterator[Outcome]:
    """Yield an outcome for each partition, as they end; ends early if a signal arrives.

    Args:
        on_rows: called with the number of rows of each batch that is predicted; again for those of a worker that died.

    Raises:
        MopefuseError: the model cannot be loaded.
    """
    waiting = deque(partitions)
    deaths: dict[str, int] = {}
    workers = [_Worker(device) for device in devices[: len(partitions)]]
    threads = os.environ.get("OMP_NUM_THREADS")
    try:
        os.environ["OMP_NUM_THREADS"] = threads or str(max(1, (os.cpu_count() or 1) // max(1, len(workers))))
        for worker in workers:
            _start(worker, job)
        while (waiting or any(worker.partition for worker in workers)) and not stop.signal_number:
            for worker in workers:
                if waiting and worker.is_ready and worker.partition is None:
                    worker.partition = waiting.popleft()
                    _send(worker, worker.partition)
            for worker in _with_news(workers):
                outcome = _receive(worker, on_rows)
                if outcome is not None:
                    yield outcome
                elif worker.connection is None:  # it died
                    failed = _bury(worker, waiting, deaths)
                    if failed is not None:
                        yield failed
                    _start(worker, job)
    finally:
        for worker in workers:
            _end(worker)
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)


def _start(worker: _Worker, job: Job) -> None:
    spawn = multiprocessing.get_context("spawn")
    worker.connection, theirs = spawn.Pipe()
    worker.is_ready, worker.partition = False, None
    worker.process = spawn.Process(target=_work, args=(theirs, job, worker.device), daemon=True)
    worker.process.start()
    theirs.close()


def _send(worker: _Worker, partition: Partition) -> None:
    assert worker.connection is not None
    with suppress(OSError):  # it has just died, which is noticed next
        worker.connection.send(partition)


def _with_news(workers: Sequence[_Worker]) -> list[_Worker]:
    ready = wait([worker.connection for worker in workers if worker.connection is not None], timeout=_POLL)
    return [worker for worker in workers if worker.connection in ready]


def _receive(worker: _Worker, on_rows: Callable[[int], None]) -> Outcome | None:
    """What a worker reports; without a connection afterwards if it died.

    Raises:
        MopefuseError: it cannot load the model.
    """
    assert worker.connection is not None
    try:
        kind, value = worker.connection.recv()
    except (EOFError, OSError):
        worker.connection.close()
        worker.connection = None
        return None
    if kind == "ready":
        worker.is_ready, worker.deaths_while_loading = True, 0
        return None
    if kind == "rows":
        on_rows(value)
        return None
    if kind == "not loaded":
        raise error_from_dict(value)
    if kind == "bug":
        raise RuntimeError(value)
    partition, worker.partition = worker.partition, None
    assert partition is not None
    return Record(**value) if kind == "done" else (partition, error_from_dict(value))


def _bury(worker: _Worker, waiting: deque[Partition], deaths: dict[str, int]) -> Outcome | None:
    """Put the partition of a worker that died back, or give it up.

    Raises:
        ResourceError: workers die while they load the model.
    """
    worker.process.join()
    code, partition = worker.process.exitcode, worker.partition
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    fix = "usually memory ran out: use a smaller --batch or fewer --workers, and start again"
    if partition is None:
        worker.deaths_while_loading += 1
        if worker.deaths_while_loading >= _MOST_DEATHS:
            what = f"worker processes died while they loaded the model ({how})"
            raise ResourceError(ResourceCode.WORKER_KILLED, what, fix=fix)
        return None
    deaths[partition.name] = deaths.get(partition.name, 0) + 1
    if deaths[partition.name] < _MOST_DEATHS:
        waiting.appendleft(partition)
        return None
    what = f"{_MOST_DEATHS} worker processes died while they predicted these rows ({how})"
    where = f"{partition.file.path}, rows {partition.span.start + 1} to {partition.span.start + partition.span.rows}"
    return partition, ResourceError(ResourceCode.WORKER_KILLED, what, where=where, fix=fix)


def _end(worker: _Worker) -> None:
    if worker.process is not None:
        worker.process.kill()  # files are written atomically
        worker.process.join()
    if worker.connection is not None:
        worker.connection.close()


def _work(connection: Connection, job: Job, device: str) -> None:
    """The life of a worker: load the model, then predict partitions until the other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to all processes; the parent ends this one
    os.environ.setdefault("MOPEFUSE_FLUSH_DENORMALS", "1")  # see mopefuse.core.device
    try:
        computer = job.model.load(device)
    except Exception as error:
        return _report(connection, error, "not loaded")
    connection.send(("ready", None))
    while True:
        try:
            partition = connection.recv()
        except (EOFError, OSError):
            return
        try:
            record = job.run(partition, computer, lambda rows: connection.send(("rows", rows)))
        except Exception as error:
            _report(connection, error, "failed")
        else:
            connection.send(("done", record._asdict()))


def _report(connection: Connection, error: Exception, kind: str) -> None:
    known = error if isinstance(error, MopefuseError) else convert_error(error)
    if known is None:
        connection.send(("bug", "".join(traceback.format_exception(error))))
    else:
        connection.send((kind, known.as_dict()))
