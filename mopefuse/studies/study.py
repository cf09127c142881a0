"""Run a study: every cell is an ordinary run in its own process, and finished cells are never run again.

A study that was killed continues when it is started again: unfinished cells resume exactly from their last checkpoint (see
`mopefuse.training.train`; on a CPU, with the same number of threads). All cells share the data index, encoder features and
decoded images through the cache. Fewer than `jobs` cells run at a time while memory does not allow more
(`mopefuse.studies.memory_budget`).
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from mopefuse import __version__
from mopefuse.config.encoder_sides import specs
from mopefuse.config.schema import WITHOUT_EFFECT
from mopefuse.core.artifact import FORMAT, dump_json, read_json
from mopefuse.core.atomic_files import remove_leftovers, write_atomically
from mopefuse.core.error_codes import ConfigCode, ResourceCode
from mopefuse.core.stop_request import StopRequest
from mopefuse.data.base import DataSet
from mopefuse.data.load import load_data
from mopefuse.errors import ConfigError, Interrupted, MopefuseError, ResourceError
from mopefuse.fusion.build import build_model
from mopefuse.runs.folder import RunFolder
from mopefuse.studies.cell_process import Message, Task, run_cell
from mopefuse.studies.memory_budget import MemoryBudget, MemoryReport
from mopefuse.studies.study_file import KIND, STUDY_FILE, Cell, Study
from mopefuse.training.resume import diff_settings

WAITING, RUNNING, FINISHED, FAILED, STOPPED = "waiting", "running", "finished", "failed", "stopped"
_POLL_SECONDS = 0.2  # between two checks for a stop signal
_IMPORTED_ONCE = ["mopefuse.studies.cell_process", "torch._dynamo", "sklearn.metrics"]
"""Modules that the server of cell processes imports for all of them; every training uses the last two, which take seconds."""


@dataclass
class Status:
    """The state of a cell, and its error if it failed."""

    cell: Cell
    state: str = WAITING
    error: dict[str, Any] | None = None
    share: float = 0.0  # fraction of its steps that are done


class StudyListener:
    """Callbacks of a study, to be overridden. These do nothing."""

    def on_notice(self, text: str) -> None:
        """Called with a message for the user."""

    def on_progress(self, statuses: Sequence[Status], eta: float | None) -> None:
        """Called while cells run. `eta`: seconds left, None while it cannot be estimated."""

    def on_cell_end(self, status: Status, statuses: Sequence[Status], eta: float | None) -> None:
        """Called when a cell has finished, failed or was stopped. `eta`: as in `on_progress`."""


def is_finished(cell: Cell, out: Path) -> bool:
    """Whether the run of a cell is finished and has exactly the settings of the cell."""
    run = RunFolder(out / cell.folder)
    try:
        return run.metrics_file.is_file() and not set(diff_settings(run.config(), cell.config)) - WITHOUT_EFFECT
    except MopefuseError:  # damaged; training raises the error
        return False


def count_trainable(cells: Sequence[Cell]) -> dict[str, int | str]:
    """Count the trainable parameters of each row of a study.

    Returns:
        Label to the count, or to the message of the error if there is no such model; only rows where it is cheap to
        know: of ``tiny:`` encoders on data that can be read.
    """
    found: dict[str, int | str] = {}
    data_of: dict[str, DataSet | None] = {}  # by data settings; None if the data cannot be read
    for cell in cells:
        config = cell.config
        if cell.label in found or not all(spec.startswith("tiny:") for spec in specs(config).values()):
            continue
        data_settings = config.data.model_dump_json()
        if data_settings not in data_of:
            try:
                data_of[data_settings] = load_data(config.data)
            except MopefuseError:
                data_of[data_settings] = None
        try:
            if (data := data_of[data_settings]) is not None:
                found[cell.label] = sum(build_model(config, data.outputs, data.task).breakdown().values())
        except MopefuseError as error:
            found[cell.label] = str(error)
    return found


def run_study(study: Study, out: Path, *, jobs: int = 1, listener: StudyListener | None = None) -> list[Status]:
    """Run the cells that are not finished, in order, at most `jobs` at a time; ``study.json`` in `out` records their states.

    A cell that fails is recorded, and the others continue; the next call runs it again.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after the running cells saved a checkpoint.
        ConfigError: `out` is not the folder of a study, another process runs this study, or the data have no such metric.
        MopefuseError: all cells use the same data, and it cannot be read.
    """
    listener = listener or StudyListener()
    with claim_folder(out, listener):
        statuses = [Status(cell, FINISHED if is_finished(cell, out) else WAITING) for cell in study.cells]
        write_study(study, out, statuses)
        waiting = [status for status in statuses if status.state != FINISHED]
        if waiting and len({status.cell.config.data.path for status in waiting}) == 1:
            config, metric = waiting[0].cell.config, study.file.metric
            data = load_data(config.data)
            task = data.task if metric is None else data.task.fitted(data.sparse_targets("train"), config)
            if metric is not None and metric not in task.metrics:
                what = f"metric {metric!r} is not defined for {task} data"
                fix = "remove the key `metric` to use the default metric"
                raise ConfigError(ConfigCode.UNKNOWN_STUDY_METRIC, what, where=f"{study.name}, metric", fix=fix)
        with StopRequest() as stop:
            Schedule(study=study, out=out, statuses=statuses, jobs=jobs, listener=listener).run(stop)
    if stop.signal_number and any(status.state != FINISHED for status in statuses):
        done = sum(status.state == FINISHED for status in statuses)
        raise Interrupted(
            stop.signal_number, f"with {done} of {len(statuses)} cells finished", fix="run the same command again to continue"
        )
    return statuses


@contextmanager
def claim_folder(out: Path, listener: StudyListener) -> Iterator[None]:
    """Create and lock the folder of a study while the context lasts.

    Raises:
        ConfigError: it is neither empty nor a study, cannot be written, or is locked by another process.
    """
    items = [item for item in out.iterdir() if not item.name.startswith((".", STUDY_FILE))] if out.is_dir() else []
    fix = "choose a different folder with --out"
    if items and not (out / STUDY_FILE).is_file():
        raise ConfigError(ConfigCode.BAD_STUDY_FOLDER, f"{out} is neither empty nor a study", where="--out", fix=fix)
    if items and read_json(out / STUDY_FILE).get("kind") != KIND:
        raise ConfigError(
            ConfigCode.BAD_STUDY_FOLDER, f"{STUDY_FILE} in {out} does not describe a mopefuse study", where="--out", fix=fix
        )
    folder = RunFolder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        notice = folder.lock()
    except OSError as error:
        raise ConfigError(
            ConfigCode.BAD_STUDY_FOLDER, f"{out} cannot be written: {error.strerror}", where="--out", fix=fix
        ) from None
    if notice:
        listener.on_notice(notice)
    try:
        remove_leftovers(out)
        yield
    finally:
        folder.unlock()


def write_study(study: Study, out: Path, statuses: Sequence[Status], more: Mapping[str, Any] | None = None) -> None:
    """Write study.json: the state of each cell, and `more` entries."""
    facts = {
        "kind": KIND,
        "format": FORMAT,
        "mopefuse": __version__,
        "name": study.name,
        "baseline": study.file.baseline,
        "metric": study.file.metric,
        "cells": [
            {
                "label": status.cell.label,
                "seed": status.cell.seed,
                "settings": status.cell.changes,
                "run": status.cell.folder,
                "state": status.state,
                "error": status.error,
            }
            for status in statuses
        ],
        **(more or {}),
    }
    write_atomically(out / STUDY_FILE, dump_json(facts))


@dataclass
class Schedule:
    """Runs cells, each in its own process, which sends messages through a pipe; the pipe closes when the process ends.

    Args:
        statuses: statuses of all cells known so far; may grow between calls of `run`.
        jobs: maximum number of processes at a time.
        to_come: number of cells that are not among `statuses` yet.
        facts: further entries of study.json.
    """

    study: Study
    out: Path
    statuses: list[Status]
    jobs: int
    listener: StudyListener
    to_come: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    running: dict[Connection, tuple[Any, Status]] = field(default_factory=dict)
    memory_budget: MemoryBudget = field(default_factory=MemoryBudget)
    notices_given: set[str] = field(default_factory=set)
    finished_count: int = 0
    began: float = field(default_factory=time.monotonic)

    def run(self, stop: StopRequest) -> None:
        """Run the waiting cells until all have ended or a stop is requested."""
        waiting = deque(status for status in self.statuses if status.state == WAITING)
        stopping = False
        try:
            while self.running or (waiting and not stopping):
                if stop.signal_number and not stopping:
                    stopping = True
                    for process, _ in self.running.values():
                        process.terminate()
                while waiting and not stopping and self._can_start():
                    self._start(waiting.popleft())
                for connection in wait(list(self.running), _POLL_SECONDS):
                    assert isinstance(connection, Connection)
                    self._receive(connection, stopping)
        finally:  # processes are left only after an unexpected error here, such as a full disk or a closed pipe
            for process, _ in self.running.values():
                process.terminate()
            for process, _ in self.running.values():
                process.join()

    def _can_start(self) -> bool:
        count = len(self.running)
        if count >= self.jobs:
            return False
        fits = self.memory_budget.fits(count)
        if not fits and self.memory_budget.largest_peak:
            self._notice(f"running fewer than --jobs {self.jobs} at a time: there is not enough memory for one more")
        return fits

    def _notice(self, text: str, prefix: str = "") -> None:
        """Pass a notice on, only once even if several cells give it."""
        if text not in self.notices_given:
            self.notices_given.add(text)
            self.listener.on_notice(f"{prefix}{text}")

    def _start(self, status: Status) -> None:
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            context.set_forkserver_preload(_IMPORTED_ONCE)
        ours, theirs = context.Pipe()
        run = (self.out / status.cell.folder).absolute()
        task = Task(status.cell.config, run, directory=os.getcwd(), threads=max(1, torch.get_num_threads() // self.jobs))
        process = context.Process(target=run_cell, args=(theirs, task))  # type: ignore[attr-defined]
        process.start()
        theirs.close()
        status.state, status.error = RUNNING, None
        self.running[ours] = (process, status)
        write_study(self.study, self.out, self.statuses, self.facts)

    def _receive(self, connection: Connection, stopping: bool) -> None:
        _, status = self.running[connection]
        try:
            message: Message = connection.recv()
        except (EOFError, OSError):
            self._end(connection, stopping)
            return
        if isinstance(message, MemoryReport):
            status.share = message.share
            self.memory_budget.update(connection, message)
            self.listener.on_progress(self.statuses, self._eta())
        elif isinstance(message, str):
            self._notice(message, f"{status.cell.label}, seed {status.cell.seed}: ")
        else:
            status.error = message.error
            status.state = STOPPED if message.interrupted else FAILED if message.error else FINISHED

    def _end(self, connection: Connection, stopping: bool) -> None:
        process, status = self.running.pop(connection)
        self.memory_budget.release(connection)
        connection.close()
        process.join()
        if status.state == RUNNING:  # it ended without sending a result
            status.state = STOPPED
        if status.state == STOPPED and not stopping:
            what = "the process of a cell was killed, probably because it ran out of memory"
            fix = "lower --jobs, and run the study again"
            status.state, status.error = (
                FAILED,
                ResourceError(ResourceCode.CELL_FAILED, what, where=status.cell.folder, fix=fix).as_dict(),
            )
        self.finished_count += status.state == FINISHED
        write_study(self.study, self.out, self.statuses, self.facts)
        self.listener.on_cell_end(status, self.statuses, self._eta())

    def _eta(self) -> float | None:
        """Estimate the seconds left, from the speed so far."""
        done = self.finished_count + sum(status.share for _, status in self.running.values())
        left = sum(status.state in (WAITING, RUNNING) for status in self.statuses) + self.to_come - (done - self.finished_count)
        return (time.monotonic() - self.began) * left / done if done > 0.02 else None
