"""The folder of a run: its configuration, its lock, its log, its checkpoints.

``config.yaml`` (resolved), ``manifest.json`` (what the run is), ``metrics.jsonl`` (a line per log step),
``metrics.json`` (final), ``checkpoints/step-N/`` and ``checkpoints/best``, a file that names the best of them; ``start/``,
the weights that a run starts from if not from scratch, until its first checkpoint is published.
A checkpoint repeats what the run's manifest says of the model, so that neither can be changed alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from mopefuse.config.recipe import read_saved, to_yaml
from mopefuse.config.schema import RunConfig, build_config
from mopefuse.core import registry
from mopefuse.core.artifact import (
    FORMAT,
    disk_error,
    dump_json,
    finite,
    publish,
    read_json,
    read_text,
    sweep,
    understood,
    verify,
    write_atomically,
)  # fmt: skip
from mopefuse.core.folder_lock import FolderLock
from mopefuse.errors import CheckpointError, ConfigError, ResourceError
from mopefuse.runs.facts import check_facts

KIND, CHECKPOINT, START = "run", "checkpoint", "start"
_PROBE = ".writable"  # a file whose creation shows that the folder can be written to
_NEWER = 7  # the number of the error of `understood`
_OF_MODEL = ("encoders", "labels", "multi_label")  # what a checkpoint repeats of the run's facts


class RunFolder:
    """A run on disk. Creating the object touches nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.manifest_file = path / "manifest.json"
        self.log_file = path / "metrics.jsonl"
        self.metrics_file = path / "metrics.json"
        self.predictions_file = path / "predictions.jsonl"
        self.checkpoints = path / "checkpoints"
        self._start = path / "start"
        self._best = self.checkpoints / "best"
        self._lock = FolderLock(path)

    # -- life cycle

    def exists(self) -> bool:
        """Whether this is the folder of a run."""
        return self.manifest_file.is_file() and read_json(self.manifest_file).get("kind") == KIND

    def begun(self) -> bool:
        """Whether there is a run to resume: one that has published a checkpoint, or does not start from scratch."""
        return self.exists() and bool(self.steps() or read_json(self.manifest_file).get("start"))

    def _never_began(self) -> bool:
        """No such folder, or one of a run that ended before its first checkpoint, as on an error in the data."""
        return not self.path.is_dir() or (self.exists() and not self.steps() and not self.metrics_file.exists())

    def _leftovers(self) -> set[Path]:
        """What a process may have left that ended before this was a run; its lock says that files are not somebody else's."""
        mine = {self._lock.file, *self.path.glob(f"{_PROBE}.tmp-*")}
        if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
            mine.add(self.checkpoints)
        if self._lock.file.is_file() and not self.manifest_file.exists():
            files = (self.config_file, self.manifest_file, self._start)
            mine |= {*files, *(path for file in files for path in self.path.glob(f"{file.name}.tmp-*"))}
        return mine

    def prepare(
        self, *, resume: bool, overwrite: bool, fix: str = "add --resume or --overwrite, or name another --out"
    ) -> None:
        """Make the folder ready for a new run, or for the one to resume, before anything slow is done; twice is once.

        Args:
            fix: what to do where there is a run already.

        Raises:
            ConfigError: not writable, not empty, being written by another process, or (with `overwrite` or `resume`,
                if there is something) not a run.
        """
        if resume and overwrite:
            raise ConfigError(25, "--resume and --overwrite contradict each other", fix="choose one")
        there = not self._never_began() and not self._leftovers().issuperset(self.path.iterdir())
        if there and not (resume or overwrite):
            raise ConfigError(23, f"{self.path} is not empty", where="--out", fix=fix)
        if there and not self.exists():
            flag = "--overwrite" if overwrite else "--resume"
            raise ConfigError(22, f"{self.path} is not a run of mopefuse", where=flag, fix="name another --out, or empty it")
        if resume and self._start.exists() and not self.exists():
            what = f"{self.path} was to start from a trained model, and was stopped before it was a run"
            raise ConfigError(250, what, where="--resume", fix="run mopefuse swap-encoder again")
        self._lock.refuse_if_taken()
        try:
            if there and overwrite:
                self._empty()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / f"{_PROBE}.tmp-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                21, f"the run directory {self.path} is not writable: {error.strerror}", where="--out", fix="name another --out"
            ) from None

    def lock(self) -> str:
        """Claim the folder for this process; a notice if the lock of a dead process was taken over.

        Raises:
            ConfigError: another process is writing this run.
        """
        notice = self._lock.take()
        sweep(self.path)
        sweep(self.checkpoints)
        return notice

    def claim(self, *, resume: bool, overwrite: bool) -> str:
        """Make the folder ready and lock it; a notice as of `lock`.

        The folder is checked again once it is locked: another process may have trained a whole run here in between.

        Raises:
            ConfigError: see `prepare` and `lock`.
        """
        self.prepare(resume=resume, overwrite=overwrite)
        notice = self.lock()
        try:
            self.prepare(resume=resume, overwrite=overwrite)
        except BaseException:
            self.unlock()
            raise
        return notice

    def unlock(self) -> None:
        """Release the folder, if this object has locked it and nobody has taken it over."""
        self._lock.release()

    def abandon(self) -> None:
        """Remove what was written if it is not a run yet, so that the next one can begin here; the folder stays."""
        if self._lock.is_ours() and not self.manifest_file.exists():
            self.config_file.unlink(missing_ok=True)
            self.drop_start()

    def _require_ours(self) -> None:
        """Refuse to write into a folder that is not there any more, or that somebody else writes to."""
        if not self._lock.claimed or self._lock.is_ours():
            return
        if self._lock.file.exists():
            fix = "let one process at a time write to it"
            raise ResourceError(252, "another process has taken over this run", where=str(self.path), fix=fix)
        if not self.manifest_file.is_file():
            fix = "put it back and go on with --resume, or train again"
            raise ResourceError(251, "the run folder is gone", where=str(self.path), fix=fix)

    def _empty(self) -> None:
        for item in self.path.iterdir():
            if item == self._lock.file and self._lock.is_ours():
                continue
            shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()

    # -- what the run is

    def start(self, config: RunConfig, facts: Mapping[str, Any]) -> None:
        """Write configuration and manifest; from here on the folder is a run."""
        write_atomically(self.config_file, to_yaml(config))
        write_atomically(self.manifest_file, dump_json({"kind": KIND, "format": FORMAT, **facts}))

    def config(self) -> RunConfig:
        """The resolved configuration.

        Raises:
            CheckpointError: the folder is not a run. PluginError: it needs a plugin that is not installed.
        """
        if not self.exists():
            inside = (child for child in self.path.iterdir() if RunFolder(child).exists()) if self.path.is_dir() else ()
            run = min(inside, default=None)
            fix = f"name a run in it, such as {run}" if run else "name a folder that mopefuse train wrote"
            raise CheckpointError(4, f"{self.path} is not a run", fix=fix)
        registry.require(self.manifest().get("plugins", ()), where=str(self.path))
        return build_config(read_saved(self.config_file), source=str(self.config_file))

    def manifest(self) -> dict[str, Any]:
        """Encoders and their fingerprints, labels, data hashes.

        Raises:
            CheckpointError: a newer version of mopefuse made this run, or its facts are damaged.
        """
        return check_facts(understood(read_json(self.manifest_file), KIND, str(self.path)), self.manifest_file)

    def _of_model(self) -> dict[str, Any]:
        known = understood(read_json(self.manifest_file), KIND, str(self.path))
        return {key: known[key] for key in _OF_MODEL if key in known}

    def result(self) -> dict[str, Any]:
        """What metrics.json says of a finished run; empty before that."""
        return read_json(self.metrics_file) if self.metrics_file.exists() else {}

    # -- log

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl.

        Raises:
            ResourceError: the disk is full, or the folder is gone or somebody else's.
        """
        self._require_ours()
        try:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(line), ensure_ascii=False) + "\n")
        except OSError as error:
            raise disk_error(error, self.log_file) from error

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that was cut short is left out.

        Raises:
            CheckpointError: it is there and cannot be read.
        """
        lines: list[dict[str, Any]] = []
        for line in read_text(self.log_file).split("\n"):
            try:
                value = json.loads(line)
            except ValueError:
                break
            if not isinstance(value, dict) or not isinstance(value.get("step"), int):
                break
            lines.append(value)
        return lines

    def rewind_log(self, step: int, *, validated: bool = True) -> None:
        """Forget what was logged after `step`, which a resumed run will log again; its validation too, if not `validated`."""
        if not self.log_file.exists():
            return
        until = [line for line in self.read_log() if line["step"] <= step]
        kept = [line for line in until if validated or line["step"] < step or "val" not in line]
        write_atomically(self.log_file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    # -- where it starts from

    def keep_start(self, write: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
        """Keep what a run starts from until its first checkpoint is published; the run's facts repeat their ``start``."""
        publish(self._start, write, {"kind": START, **facts})

    def kept_start(self) -> tuple[Path, dict[str, Any]] | None:
        """The folder of `keep_start`, verified, with its facts; None for a run that has a checkpoint or starts from scratch.

        Raises:
            CheckpointError: it is damaged, gone, or of another run.
        """
        expected = read_json(self.manifest_file).get("start")
        if self.steps() or not expected:
            return None
        try:
            facts = verify(self._start, kind=START)
            if facts.get("start") != expected:
                raise CheckpointError(250, "what is kept is not what this run starts from", where=str(self._start))
        except CheckpointError as error:
            error.fix = "begin anew: run mopefuse swap-encoder again"
            raise
        return self._start, facts

    def drop_start(self) -> None:
        """Forget what the run was to start from."""
        shutil.rmtree(self._start, ignore_errors=True)

    # -- checkpoints

    def save(self, step: int, write: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
        """Publish checkpoint step-N, and drop those that neither resume nor the best needs.

        Raises:
            ResourceError: the disk is full, or the folder is gone or somebody else's.
        """
        self._require_ours()
        publish(self.checkpoints / f"step-{step}", write, {"kind": CHECKPOINT, "step": step, **self._of_model(), **facts})
        self.drop_start()
        keep = {step, self.best_step()}
        for old in self.steps():
            if old not in keep:
                shutil.rmtree(self.checkpoints / f"step-{old}")

    def set_best(self, step: int) -> None:
        """Name the best checkpoint."""
        write_atomically(self._best, f"step-{step}\n")

    def best_step(self) -> int | None:
        """Step of the best checkpoint so far.

        Raises:
            CheckpointError: the file that names it is damaged.
        """
        if not self._best.exists():
            return None
        step = read_text(self._best).strip().removeprefix("step-")
        if not (step.isascii() and step.isdecimal()):
            raise CheckpointError(3, "the file best is damaged", where=str(self._best), fix="use the checkpoint last or step-N")
        return int(step)

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, by step, with its manifest; None if there are no checkpoints.

        Raises:
            CheckpointError: the newest is of a newer version of mopefuse, or none is whole.
        """
        damaged = None
        for step in reversed(self.steps()):
            folder = self.checkpoints / f"step-{step}"
            try:
                return folder, verify(folder, kind=CHECKPOINT)
            except CheckpointError as error:
                if error.number == _NEWER:
                    raise
                damaged = damaged or error
        if damaged is not None:
            damaged.fix = "begin a new run: no other checkpoint is whole"
            raise damaged
        return None

    def checkpoint(self, which: str = "best") -> tuple[Path, dict[str, Any]]:
        """The checkpoint ``best``, ``last`` or ``step-N``, verified, with its manifest.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged, or the run's manifest says something else.
        """
        steps = self.steps()
        if which == "last" and steps:
            which = f"step-{steps[-1]}"
        if which == "best" and self.best_step() is not None:
            which = f"step-{self.best_step()}"
        folder = self.checkpoints / which
        if which not in {f"step-{step}" for step in steps}:
            there = ", ".join(f"step-{step}" for step in steps) or "none"
            raise CheckpointError(4, f"there is no checkpoint {which}", where=str(self.checkpoints), fix=f"there are: {there}")
        try:
            manifest = verify(folder, kind=CHECKPOINT)
        except CheckpointError as error:
            others = [f"step-{step}" for step in steps if f"step-{step}" != which]
            if others and error.number != _NEWER:
                error.fix = f"use --checkpoint {others[-1]}"
            raise
        differ = [key for key, value in self._of_model().items() if manifest.get(key, value) != value]
        if differ:
            what = f"the {differ[0]} of the run are not those that its checkpoint was trained for"
            raise CheckpointError(3, what, where=str(self.path), fix="restore the run's manifest.json")
        return folder, manifest

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, whole or not, in order."""
        found = self.checkpoints.glob("step-*")
        return sorted(int(path.name[5:]) for path in found if path.is_dir() and re.fullmatch(r"step-(0|[1-9]\d*)", path.name))


def default_path() -> Path:
    """runs/<date>-<time>, for a run without a name."""
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}"
