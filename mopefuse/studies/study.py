"""Run a study: every cell an ordinary run in a process of its own, what is finished never again.

Killed at any moment and started again, a study goes on where it was; cells that were under way resume from their last
checkpoint, exactly (`mopefuse.training.train`, on a CPU with the same number of threads). Index of the data, features of frozen
encoders and decoded images are shared by all cells through the cache. Fewer cells than `jobs` run where memory does not
allow one more as large as the largest so far (`mopefuse.studies.memory_budget`).
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from mopefuse import __version__
from mopefuse.config.schema import WITHOUT_EFFECT, RunConfig
from mopefuse.config.sides import specs
from mopefuse.core import device as devices
from mopefuse.core.artifact import FORMAT, dump_json, read_json, sweep, write_atomically
from mopefuse.core.dependencies import mendable
from mopefuse.data.load import load_data
from mopefuse.errors import ConfigError, Interrupted, MopefuseError, ResourceError
from mopefuse.fusion.build import build_model
from mopefuse.runs.folder import RunFolder
from mopefuse.studies.memory_budget import Room, Told
from mopefuse.studies.study_file import KIND, STUDY_FILE, Cell, Study
from mopefuse.training.resume import differing
from mopefuse.training.stop_request import StopRequest
from mopefuse.training.train import train
from mopefuse.training.trainer import Listener, Progress

WAITING, RUNNING, FINISHED, FAILED, STOPPED = "waiting", "running", "finished", "failed", "stopped"
_TICK = 0.2  # seconds between looks at signals
_TELL_EVERY = 0.5  # seconds between messages of a cell on its way


@dataclass
class Status:
    """Where a cell stands."""

    cell: Cell
    state: str = WAITING
    error: dict[str, Any] | None = None
    share: float = 0.0  # of its steps


class StudyListener:
    """What a study tells whoever watches. Nothing here prints."""

    def notice(self, text: str) -> None:
        """Something worth a line."""

    def moved(self, statuses: Sequence[Status], eta: float | None) -> None:
        """Steps were made; `eta` in seconds, None as long as it cannot be told."""

    def ended(self, status: Status, statuses: Sequence[Status], eta: float | None) -> None:
        """A cell is finished, failed or stopped."""


def is_finished(cell: Cell, out: Path) -> bool:
    """Whether a cell was run to its end, with just these settings."""
    run = RunFolder(out / cell.folder)
    try:
        return run.metrics_file.is_file() and not set(differing(run.config(), cell.config)) - WITHOUT_EFFECT
    except MopefuseError:  # damaged; training says what is wrong with it
        return False


def trainable(cells: Sequence[Cell]) -> dict[str, int | str]:
    """Label to trainable parameters, or why there is no such model, where that is cheap: with data and encoders at hand."""
    found: dict[str, int | str] = {}
    labels: dict[str, int] = {}  # by how data are read; 0 of what cannot be read
    for cell in cells:
        config = cell.config
        if cell.label in found or not all(spec.startswith("tiny:") for spec in specs(config).values()):
            continue
        how = config.data.model_dump_json()
        if how not in labels:
            try:
                labels[how] = len(load_data(config.data).labels)
            except MopefuseError:
                labels[how] = 0
        try:
            if labels[how]:
                found[cell.label] = sum(build_model(config, labels[how]).breakdown().values())
        except MopefuseError as error:
            found[cell.label] = str(error)
    return found


def run_study(study: Study, out: Path, *, jobs: int = 1, listener: StudyListener | None = None) -> list[Status]:
    """Run the cells that are not finished, in order, `jobs` at a time; ``study.json`` in `out` says how each stands.

    A cell that fails is recorded and the others go on; the next call tries it again.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after the cells under way published a checkpoint.
        ConfigError: `out` is something else, or another process runs this study.
        MopefuseError: the data cannot be used, and all cells have the same.
    """
    listener = listener or StudyListener()
    with claimed(out, listener):
        statuses = [Status(cell, FINISHED if is_finished(cell, out) else WAITING) for cell in study.cells]
        write(study, out, statuses)
        waiting = [status for status in statuses if status.state != FINISHED]
        if waiting and len({status.cell.config.data.path for status in waiting}) == 1:
            metric, multi_label = study.file.metric, load_data(waiting[0].cell.config.data).multi_label
            if metric in (("accuracy",) if multi_label else ("f1_micro", "f1_samples")):
                what = f"{'multi-label' if multi_label else 'single-label'} data have no {metric}"
                raise ConfigError(115, what, where=f"{study.name}, metric", fix="leave it out for the usual one")
        with StopRequest() as stop:
            Schedule(study, out, statuses, jobs, listener).run(stop)
    if stop.signal_number and any(status.state != FINISHED for status in statuses):
        done = sum(status.state == FINISHED for status in statuses)
        raise Interrupted(
            stop.signal_number, f"with {done} of {len(statuses)} cells finished", fix="run the same command again to go on"
        )
    return statuses


@contextmanager
def claimed(out: Path, listener: StudyListener) -> Iterator[None]:
    """The folder of the study, for this process alone."""
    there = [item for item in out.iterdir() if not item.name.startswith((".", STUDY_FILE))] if out.is_dir() else []
    if there and not (out / STUDY_FILE).is_file():
        raise ConfigError(82, f"{out} is not empty, and no study", where="--out", fix="name another --out")
    if there and read_json(out / STUDY_FILE).get("kind") != KIND:
        raise ConfigError(82, f"{STUDY_FILE} in {out} is not of a study of mopefuse", where="--out", fix="name another --out")
    folder = RunFolder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        notice = folder.lock()
    except OSError as error:
        raise ConfigError(82, f"{out} cannot be written: {error.strerror}", where="--out", fix="name another --out") from None
    if notice:
        listener.notice(notice)
    try:
        sweep(out)
        yield
    finally:
        folder.unlock()


def write(study: Study, out: Path, statuses: Sequence[Status], more: Mapping[str, Any] | None = None) -> None:
    """study.json: how each cell stands."""
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
    """The cells under way: one process each, which speaks through a pipe and is gone when the pipe is.

    statuses: may grow between calls of `run`. to_come: cells that are not among them yet. facts: more of study.json.
    """

    study: Study
    out: Path
    statuses: list[Status]
    jobs: int
    listener: StudyListener
    to_come: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    running: dict[Connection, tuple[Any, Status]] = field(default_factory=dict)
    room: Room = field(default_factory=Room)
    told: set[str] = field(default_factory=set)
    made: int = 0
    began: float = field(default_factory=time.monotonic)

    def run(self, stop: StopRequest) -> None:
        """Run the cells that are waiting, until they ended or it is asked to stop."""
        waiting = deque(status for status in self.statuses if status.state == WAITING)
        stopping = False
        try:
            while self.running or (waiting and not stopping):
                if stop.signal_number and not stopping:
                    stopping = True
                    for process, _ in self.running.values():
                        process.terminate()
                while waiting and not stopping and self._may_start():
                    self._start(waiting.popleft())
                for connection in wait(list(self.running), _TICK):
                    assert isinstance(connection, Connection)
                    self._hear(connection, stopping)
        finally:  # empty, unless something went wrong here: a full disk, nobody who reads what is printed
            for process, _ in self.running.values():
                process.terminate()
            for process, _ in self.running.values():
                process.join()

    def _may_start(self) -> bool:
        count = len(self.running)
        if count >= self.jobs:
            return False
        fits = self.room.fits(count)
        if not fits and self.room.largest:
            self._notice(f"not all of --jobs {self.jobs} at a time: memory has no room for one more", "")
        return fits

    def _notice(self, text: str, of: str) -> None:
        """What more than one cell would say is told once."""
        if text not in self.told:
            self.told.add(text)
            self.listener.notice(f"{of}{text}")

    def _start(self, status: Status) -> None:
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            context.set_forkserver_preload(["mopefuse.studies.study"])  # imports are made once, not by each cell
        here, there = context.Pipe()
        threads = max(1, torch.get_num_threads() // self.jobs)
        run = (self.out / status.cell.folder).absolute()
        process = context.Process(target=_work, args=(there, status.cell.config, run, os.getcwd(), threads))  # type: ignore[attr-defined]
        process.start()
        there.close()
        status.state, status.error = RUNNING, None
        self.running[here] = (process, status)
        write(self.study, self.out, self.statuses, self.facts)

    def _hear(self, connection: Connection, stopping: bool) -> None:
        _, status = self.running[connection]
        try:
            said = connection.recv()
        except (EOFError, OSError):
            self._end(connection, stopping)
            return
        if isinstance(said, Told):
            status.share = said.share
            self.room.hear(connection, said)
            self.listener.moved(self.statuses, self._eta())
        elif isinstance(said, str):
            self._notice(said, f"{status.cell.label}, seed {status.cell.seed}: ")
        else:
            status.state, status.error = said

    def _end(self, connection: Connection, stopping: bool) -> None:
        process, status = self.running.pop(connection)
        self.room.leave(connection)
        connection.close()
        process.join()
        if status.state == RUNNING:  # it said no last word
            status.state = STOPPED
        if status.state == STOPPED and not stopping:
            what, fix = "the process of a cell was killed; usually host memory", "lower --jobs, and run the study again"
            status.state, status.error = FAILED, ResourceError(11, what, where=status.cell.folder, fix=fix).as_dict()
        self.made += status.state == FINISHED
        write(self.study, self.out, self.statuses, self.facts)
        self.listener.ended(status, self.statuses, self._eta())

    def _eta(self) -> float | None:
        """Seconds that the rest takes at the speed so far."""
        made = self.made + sum(status.share for _, status in self.running.values())
        left = sum(status.state in (WAITING, RUNNING) for status in self.statuses) + self.to_come - (made - self.made)
        return (time.monotonic() - self.began) * left / made if made > 0.02 else None


class _Tell(Listener):
    """Sends the share of the steps that are made, what memory that takes, and notices."""

    def __init__(self, connection: Connection, config: RunConfig) -> None:
        self.connection, self.config, self.told = connection, config, 0.0

    def notice(self, text: str) -> None:
        self.connection.send(text)

    def step(self, progress: Progress, total: int, loss: float, lr: float) -> None:
        if time.monotonic() - self.told >= _TELL_EVERY:
            self.told = time.monotonic()
            self.send(progress.step / total)

    def send(self, share: float) -> None:
        device = devices.resolve(self.config.device)
        self.connection.send(Told(share, devices.peak_memory(device), devices.free_memory(device)))


def _work(connection: Connection, config: RunConfig, run: Path, place: str, threads: int) -> None:
    """One cell, in its process. Its last word is (state, error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study hears Ctrl-C and tells; training listens by itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.chdir(place)
    torch.set_num_threads(threads)
    if run.is_dir() and not RunFolder(run).exists():
        shutil.rmtree(run)  # killed before it was a run
    listener = _Tell(connection, config)
    try:
        train(config, run, resume=True, listener=listener)
        listener.send(1.0)
        word: tuple[str, dict[str, Any] | None] = (FINISHED, None)
    except Interrupted:
        word = (STOPPED, None)
    except MopefuseError as error:
        word = (FAILED, error.as_dict())
    except Exception as error:
        known = mendable(error)
        word = (FAILED, known.as_dict() if known else _bug(error, run))
    connection.send(word)
    connection.close()


def _bug(error: Exception, run: Path) -> dict[str, Any]:
    log = run.with_name(f"{run.name}-crash.log")
    log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return {"code": "MF-INT-00", "exit": 1, "message": f"{type(error).__name__}: {error}", "where": str(log), "hint": ""}


def _end_with_parent() -> None:
    """A study that is killed takes its cells with it, so that nothing is in the way of the next one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        sys.stderr.flush()
        os._exit(1)
