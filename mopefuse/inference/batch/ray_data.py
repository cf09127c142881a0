"""Predict partitions with Ray Data: tasks read and prepare rows, actors hold the model, tasks write partitions.

Each partition is a fixed number of successive chunks, the last of which may be empty, so that rearranging the chunks into
blocks of this number gives one block for each partition. A task that is tried again writes the same file again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

from mopefuse.core.dependencies import require
from mopefuse.core.error_codes import ResourceCode
from mopefuse.core.formatting import json_text
from mopefuse.core.stop_request import StopRequest
from mopefuse.errors import MopefuseError, ResourceError, error_from_dict
from mopefuse.inference.batch.job import Chunk, Computer, Job, ModelSource
from mopefuse.inference.batch.local import Outcome
from mopefuse.inference.batch.output import Output, Record
from mopefuse.inference.batch.plan import Partition
from mopefuse.inference.bundle import Bundle

_Row = dict[str, Any]
_INPUT_BLOCKS = 1000  # blocks of partitions to read, at most
_MB = 2**20
_OBJECTS_MB = 512  # of a cluster on this machine: chunks between the steps
_BLOCK_MB = 16  # of chunks that travel together
_READ_MB = 128  # that Ray reserves for a task that reads; that actors reserve other resources also keeps the two steps apart

_HOST_AND_PORT = re.compile(r"(?:ray://)?([\w.-]+):(\d+)")
_PATIENCE = 10.0  # seconds to connect to a cluster


def require_ray() -> None:
    """Raises: PackageError: Ray Data is not installed."""
    require("ray", "pyarrow", extra="ray", what="--engine ray")


def run(
    job: Job, computer: Computer, partitions: Sequence[Partition], workers: int | None, device: str, address: str | None,
    stop: StopRequest,
) -> Iterator[Outcome]:  # fmt: skip
    """Yield an outcome for each partition, as they end; ends early if a signal arrives.

    Args:
        computer: the model, for what prepares rows for it. workers: actors; None for one per GPU of the cluster, or one.
        device: "auto" uses GPUs if the cluster has some. address: of the cluster; None for one on this machine.

    Raises:
        ResourceError: the cluster cannot be reached or used. MopefuseError: the model cannot be loaded.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
    require_ray()
    import ray

    try:
        _connect(address, workers)
        _raise_on_signals(stop)
        for row in _pipeline(job, computer, partitions, workers, device).iter_rows():
            yield _outcome(row, partitions)
    except _Stopped:
        return
    except ray.exceptions.RayError as error:
        raise _known(error) from error
    finally:
        ray.shutdown()


class _Stopped(BaseException):
    """A signal arrived."""


def _raise_on_signals(stop: StopRequest) -> None:
    """Let signals end the wait for a partition; after Ray has set its own handler, and until `stop` restores others."""

    def end(number: int, frame: FrameType | None) -> None:
        if not stop.signal_number:
            stop.signal_number = number
            raise _Stopped

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, end)


def _connect(address: str | None, workers: int | None) -> None:
    """Raises: ResourceError: see `run`."""
    import ray

    how: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "ignore_reinit_error": True}
    if address is None:
        cores = max(os.cpu_count() or 1, (workers or 1) + 1)
        how |= {"num_cpus": cores, "object_store_memory": _OBJECTS_MB * _MB, "include_dashboard": False}
    try:
        if (found := _HOST_AND_PORT.fullmatch(address or "")) is not None:  # Ray itself would try for many minutes
            socket.create_connection((found[1], int(found[2])), timeout=_PATIENCE).close()
        ray.init(address=address or "local", **how)
    except Exception as error:  # OSError, RuntimeError, ValueError
        what = f"cannot connect to the Ray cluster: {str(error).strip().partition(chr(10))[0]}"
        fix = "check the address, or leave out --ray-address to use this machine"
        raise ResourceError(ResourceCode.OTHER_PROCESS_FAILED, what, where=address or "ray.init", fix=fix) from None


def _pipeline(job: Job, computer: Computer, partitions: Sequence[Partition], workers: int | None, device: str) -> Any:
    """The dataset whose rows are outcomes."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = _BLOCK_MB * _MB
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    resources: Any = ray.cluster_resources
    gpus = int(resources().get("GPU", 0)) if device in ("auto", "cuda") else 0
    model = computer.predictor.model
    prepares = job.prepares and not isinstance(model, Bundle)  # a bundle cannot be sent to other processes
    reader = replace(job.reader, collate=model.collate if prepares else None)
    chunks = max(-(-partition.span.rows // reader.batch) for partition in partitions)
    shared = ray.put((reader, list(partitions)))
    rows = [{"partition": number} for number in range(len(partitions))]
    data: Any = ray.data.from_items(rows, override_num_blocks=min(len(rows), _INPUT_BLOCKS))
    data = data.flat_map(_Read(shared, chunks), num_cpus=1, memory=_READ_MB * _MB)
    data = data.map_batches(
        _Predict,
        fn_constructor_args=(job.model, f"cuda:{0}" if gpus else device if device != "auto" else "cpu"),
        batch_size=None,
        batch_format="pandas",
        compute=ray.data.ActorPoolStrategy(size=workers or max(1, gpus)),
        num_cpus=None if gpus else 1,
        num_gpus=1 if gpus else None,
    )
    data = data.repartition(target_num_rows_per_block=chunks, strict=True)
    return data.map_batches(_Write(shared, job.output), batch_size=None, batch_format="pandas", num_cpus=0.25)


class _Read:
    """Reads a partition as a fixed number of chunks; the first step."""

    def __init__(self, shared: Any, chunks: int) -> None:
        self._shared, self._chunks = shared, chunks

    def __call__(self, row: _Row) -> Iterator[_Row]:
        import ray

        reader, partitions = ray.get(self._shared)
        number, began = int(row["partition"]), time.time()
        at, last = -1, Chunk()
        for at, chunk in enumerate(reader.chunks(partitions[number])):
            if at and chunk.problem is None:
                yield {"partition": number, "chunk": at - 1, "began": began, "content": last}
            elif at:  # in place of the chunk before, as there may be no place left
                at -= 1
            last = chunk
        for empty in range(max(at, 0), self._chunks):
            yield {"partition": number, "chunk": empty, "began": began, "content": last}
            last = Chunk()


class _Predict:
    """Holds the model in an actor; the second step."""

    def __init__(self, source: ModelSource, device: str) -> None:
        os.environ.setdefault("MOPEFUSE_FLUSH_DENORMALS", "1")  # see mopefuse.core.device
        self._computer = source.load(device)

    def __call__(self, rows: Any) -> Any:
        rows["content"] = [json_text(self._predict(chunk)) for chunk in rows["content"]]
        return rows

    def _predict(self, chunk: Chunk) -> Any:
        """The predictions, or an error; as JSON, since Ray would change mappings."""
        try:
            return self._computer.predict(chunk) if chunk.pairs or chunk.problem else []
        except MopefuseError as error:
            return error.as_dict()


class _Write:
    """Writes a partition, of which it gets all chunks; the last step."""

    def __init__(self, shared: Any, output: Output) -> None:
        self._shared, self._output = shared, output

    def __call__(self, rows: Any) -> _Row:
        import ray

        _, partitions = ray.get(self._shared)
        numbers = {int(number) for number in rows["partition"]}
        assert len(numbers) == 1 and list(rows["chunk"]) == list(range(len(rows))), "one partition, with all its chunks"
        number = numbers.pop()
        contents = [json.loads(text) for text in rows["content"]]
        problems = [one for one in contents if isinstance(one, dict)]
        try:
            if problems:
                raise error_from_dict(problems[0])
            predictions = [one for each in contents for one in each]
            seconds = time.time() - float(rows["began"].iloc[0])
            outcome: Mapping[str, Any] = self._output.write(partitions[number], predictions, seconds)._asdict()
        except MopefuseError as error:
            outcome = {"problem": error.as_dict()}
        return {"partition": [number], "outcome": [json_text(outcome)]}


def _outcome(row: Mapping[str, Any], partitions: Sequence[Partition]) -> Outcome:
    found = json.loads(row["outcome"])
    if "problem" in found:
        return partitions[int(row["partition"])], error_from_dict(found["problem"])
    return Record(**found)


def _known(error: Any) -> Exception:
    """The error of mopefuse that an error of Ray was caused by, or one about Ray."""
    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(inner, MopefuseError):
            return inner
        cause = inner if isinstance(inner, BaseException) and inner is not cause else None
    what = f"Ray gave up: {str(error).strip().rpartition(chr(10))[2]}"
    fix = "see the log of Ray, and start again to continue"
    return ResourceError(ResourceCode.OTHER_PROCESS_FAILED, what, where="ray", fix=fix)
