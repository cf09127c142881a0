"""Measurement of the memory that a call adds: the CUDA allocator's peak, or the growth of a fresh process.

On a CPU a server process builds the inputs that all measurements share, without threads; each measurement runs in a fork of
it, whose memory nothing else has used.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mopefuse.core import device as devices
from mopefuse.core.error_codes import ResourceCode
from mopefuse.errors import ResourceError

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Measure = Callable[[Any, Any], int]  # maps the shared inputs and a case to bytes


def memory_growth(device: torch.device, *calls: Callable[[], object]) -> int:
    """Bytes by which the peak during some calls exceeds the memory in use before them, in this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = _reset_peak(device)
    for call in calls:
        call()
    return max(0, _peak(device) - before)


def in_fresh_processes(build: Callable[[], Any], measure: Measure, cases: Sequence[Any]) -> Iterator[int]:
    """Measure each case in a separate process.

    Args:
        build: creates the inputs that all measurements share; called with one thread.

    Raises:
        ResourceError: a process was killed, usually for lack of memory.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, torch.get_num_threads(), build, measure))
    process.start()
    there.close()
    try:
        for case in cases:
            here.send(case)
            result = _receive(here)
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        here.close()
        process.join()


def _receive(connection: Connection) -> Any:
    try:
        return connection.recv()
    except EOFError:
        what = "a process that measured memory was killed, usually for lack of memory"
        return ResourceError(ResourceCode.MEASUREMENT_ENDED, what, where="bench", fix="lower --batch, or add --no-memory")


def _serve(connection: Connection, threads: int, build: Callable[[], Any], measure: Measure) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    shared = build()
    forks = "fork" in multiprocessing.get_all_start_methods()
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        if not forks:
            _send_measurement(connection, threads, measure, shared, case)
            continue
        context: Any = multiprocessing.get_context("fork")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_send_measurement, args=(there, threads, measure, shared, case))
        process.start()
        there.close()
        connection.send(_receive(here))
        process.join()


def _send_measurement(connection: Connection, threads: int, measure: Measure, shared: Any, case: Any) -> None:
    torch.set_num_threads(threads)
    try:
        connection.send(measure(shared, case))
    except Exception as error:
        connection.send(error)


def _reset_peak(device: torch.device) -> int:
    try:
        _RESET.write_text("5")  # resets VmHWM, the peak
    except OSError:  # not Linux: the peak may include building the model
        return devices.peak_memory(device)
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda" or not _STATUS.exists():
        return devices.peak_memory(device)
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
