"""The process that runs one cell of a study, and the messages that it sends to the study through a pipe."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from mopefuse.config.schema import RunConfig
from mopefuse.core import device as devices
from mopefuse.core.dependencies import convert_error
from mopefuse.errors import Interrupted, MopefuseError
from mopefuse.runs.folder import RunFolder
from mopefuse.studies.memory_budget import MemoryReport
from mopefuse.training.listener import Listener, Progress
from mopefuse.training.train import train

_REPORT_EVERY = 0.5  # seconds between two memory reports


@dataclass(frozen=True)
class Task:
    """The arguments of a cell's process.

    Args:
        run: absolute path of the run folder. directory: the working directory that relative paths of `config` refer to.
        threads: for torch.
    """

    config: RunConfig
    run: Path
    directory: str
    threads: int


@dataclass(frozen=True)
class Result:
    """The last message of a process: its error, if it failed; whether it was interrupted."""

    error: dict[str, Any] | None = None
    interrupted: bool = False


Message = MemoryReport | str | Result
"""What a process sends: memory reports and notices while it trains, then one result."""


def run_cell(connection: Connection, task: Task) -> None:
    """Train one run to its end, or resume it; every outcome, also an unexpected error, is sent as a `Result`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study handles Ctrl-C and terminates its cells
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.chdir(task.directory)
    torch.set_num_threads(task.threads)
    if task.run.is_dir() and not RunFolder(task.run).exists():
        shutil.rmtree(task.run)  # an earlier process was killed before the folder was a run
    sender = _Sender(connection, task.config)
    try:
        train(task.config, task.run, resume=True, listener=sender)
        sender.send_report(1.0)
        result = Result()
    except Interrupted:
        result = Result(interrupted=True)
    except MopefuseError as error:
        result = Result(error.as_dict())
    except Exception as error:
        known = convert_error(error)
        result = Result(known.as_dict() if known else _write_crash_log(error, task.run))
    connection.send(result)
    connection.close()


class _Sender(Listener):
    """Sends memory reports and notices of training."""

    def __init__(self, connection: Connection, config: RunConfig) -> None:
        self.connection, self.config, self.last_report = connection, config, 0.0

    def on_notice(self, text: str) -> None:
        self.connection.send(text)

    def on_step(self, progress: Progress, total: int, loss: float, lr: float) -> None:
        if time.monotonic() - self.last_report >= _REPORT_EVERY:
            self.last_report = time.monotonic()
            self.send_report(progress.step / total)

    def send_report(self, share: float) -> None:
        device = devices.resolve(self.config.device)
        self.connection.send(MemoryReport(share, devices.peak_memory(device), devices.free_memory(device)))


def _write_crash_log(error: Exception, run: Path) -> dict[str, Any]:
    """Write the traceback of a bug next to the run folder; returns the error as a dictionary."""
    log = run.with_name(f"{run.name}-crash.log")
    log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return {"code": "MF-INT-00", "exit": 1, "message": f"{type(error).__name__}: {error}", "where": str(log), "hint": ""}


def _exit_with_parent() -> None:
    """Exit when the study is killed, so that no orphaned process interferes with the next study."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        sys.stderr.flush()
        os._exit(1)
