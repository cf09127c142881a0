"""The folder of a run: its configuration, its lock, its log, its checkpoints.

``config.yaml`` (resolved), ``manifest.json`` (encoders, labels, data), ``metrics.jsonl`` (a line per logged step),
``metrics.json`` (the result), ``checkpoints/step-N/`` and ``checkpoints/best``, a text file with the name of the best
checkpoint; ``start/``, the initial weights of a run that does not start from scratch, until its first checkpoint is published.
Each checkpoint repeats the model facts of the run's manifest, so that an edit of only one of the two is detected.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from mopefuse.config.recipe import saved_config, to_yaml
from mopefuse.config.schema import RunConfig
from mopefuse.core import registry
from mopefuse.core.artifact import FORMAT, check_manifest, dump_json, finite, publish, read_json, read_text, verify
from mopefuse.core.atomic_files import disk_error, remove_leftovers, write_atomically
from mopefuse.core.error_codes import CheckpointCode, ConfigCode, ResourceCode
from mopefuse.core.folder_lock import FolderLock
from mopefuse.errors import CheckpointError, ConfigError, ResourceError
from mopefuse.runs.check_facts import check_facts
from mopefuse.tasks.base import with_task

KIND, CHECKPOINT, START = "run", "checkpoint", "start"
_PROBE = ".writable"  # name of a file that is created to see whether the folder is writable
_MODEL_FACTS = ("encoders", "labels", "task")  # repeated in each checkpoint


class RunFolder:
    """A run on disk. Creating the object does not touch the disk."""

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
        """Whether the folder is a run."""
        return self.manifest_file.is_file() and read_json(self.manifest_file).get("kind") == KIND

    def can_resume(self) -> bool:
        """Whether there is a run to resume: one with a checkpoint, or one that does not start from scratch."""
        return self.exists() and bool(self.steps() or read_json(self.manifest_file).get("start"))

    def _has_no_checkpoint(self) -> bool:
        """Whether the folder is missing, or a run that ended before its first checkpoint, for example by a data error."""
        return not self.path.is_dir() or (self.exists() and not self.steps() and not self.metrics_file.exists())

    def _leftovers(self) -> set[Path]:
        """Files of a process that ended before the folder became a run; its lock file sets them apart from a user's."""
        leftovers = {self._lock.file, *self.path.glob(f"{_PROBE}.tmp-*")}
        if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
            leftovers.add(self.checkpoints)
        if self._lock.file.is_file() and not self.manifest_file.exists():
            files = (self.config_file, self.manifest_file, self._start)
            leftovers |= {*files, *(path for file in files for path in self.path.glob(f"{file.name}.tmp-*"))}
        return leftovers

    def prepare(
        self, *, resume: bool, overwrite: bool, fix: str = "add --resume or --overwrite, or choose a different --out"
    ) -> None:
        """Make the folder ready for a new or a resumed run, before anything slow is done; safe to call twice.

        Args:
            fix: the error's advice if the folder already holds a run.

        Raises:
            ConfigError: the folder is not writable, not empty, being written by another process, or (with `overwrite` or
                `resume`) neither empty nor a run.
        """
        if resume and overwrite:
            raise ConfigError(
                ConfigCode.RESUME_AND_OVERWRITE, "--resume and --overwrite contradict each other", fix="remove one of them"
            )
        occupied = not self._has_no_checkpoint() and not self._leftovers().issuperset(self.path.iterdir())
        if occupied and not (resume or overwrite):
            raise ConfigError(ConfigCode.RUN_FOLDER_NOT_EMPTY, f"{self.path} is not empty", where="--out", fix=fix)
        if occupied and not self.exists():
            flag = "--overwrite" if overwrite else "--resume"
            fix = "choose a different --out, or empty the folder"
            raise ConfigError(ConfigCode.NOT_A_RUN_FOLDER, f"{self.path} is not a mopefuse run", where=flag, fix=fix)
        if resume and self._start.exists() and not self.exists():
            what = f"{self.path} was interrupted before its initial weights were saved"
            raise ConfigError(ConfigCode.START_WAS_INTERRUPTED, what, where="--resume", fix="run mopefuse swap-encoder again")
        self._lock.raise_if_locked()
        try:
            if occupied and overwrite:
                self._empty()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / f"{_PROBE}.tmp-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                ConfigCode.RUN_FOLDER_NOT_WRITABLE,
                f"the run folder {self.path} is not writable: {error.strerror}",
                where="--out",
                fix="choose a different --out",
            ) from None

    def lock(self) -> str:
        """Lock the folder for this process.

        Returns:
            A notice if the lock of a dead process was taken over, else an empty string.

        Raises:
            ConfigError: another process is writing to this run.
        """
        notice = self._lock.take()
        remove_leftovers(self.path)
        remove_leftovers(self.checkpoints)
        return notice

    def claim(self, *, resume: bool, overwrite: bool) -> str:
        """`prepare` and `lock`; returns the notice of `lock`.

        The folder is checked again after locking, because another process may have trained a whole run in between.

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
        """Release the lock, unless this object does not hold it or another process took it over."""
        self._lock.release()

    def abandon(self) -> None:
        """Remove what was written if the folder is not a run yet, so that the next run can use it; the folder stays."""
        if self._lock.is_ours() and not self.manifest_file.exists():
            self.config_file.unlink(missing_ok=True)
            self.drop_initial_weights()
            with suppress(OSError):  # it has files of someone else
                self.checkpoints.rmdir()

    def _require_owned(self) -> None:
        """Refuse to write to a folder that was removed, or that another process has taken over."""
        if not self._lock.is_held or self._lock.is_ours():
            return
        if self._lock.file.exists():
            fix = "run one process at a time on this folder"
            raise ResourceError(
                ResourceCode.RUN_TAKEN_OVER, "another process has taken over this run", where=str(self.path), fix=fix
            )
        if not self.manifest_file.is_file():
            fix = "restore it and continue with --resume, or train again"
            raise ResourceError(ResourceCode.RUN_FOLDER_GONE, "the run folder is gone", where=str(self.path), fix=fix)

    def _empty(self) -> None:
        for item in self.path.iterdir():
            if item == self._lock.file and self._lock.is_ours():
                continue
            shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()

    # -- configuration, manifest, result

    def start(self, config: RunConfig, facts: Mapping[str, Any]) -> None:
        """Write configuration and manifest, which makes the folder a run."""
        write_atomically(self.config_file, to_yaml(config))
        write_atomically(self.manifest_file, dump_json({"kind": KIND, "format": FORMAT, **facts}))

    def config(self) -> RunConfig:
        """The resolved configuration.

        Raises:
            CheckpointError: the folder is not a run. PluginError: a plugin that the run needs is not installed.
        """
        if not self.exists():
            inside = (child for child in self.path.iterdir() if RunFolder(child).exists()) if self.path.is_dir() else ()
            run = min(inside, default=None)
            fix = f"pass a run in it, such as {run}" if run else "pass a folder written by mopefuse train"
            raise CheckpointError(CheckpointCode.NOT_FOUND, f"{self.path} is not a run", fix=fix)
        registry.require(self.manifest()["plugins"], where=str(self.path))
        return saved_config(self.config_file)

    def manifest(self) -> dict[str, Any]:
        """The facts of the run: encoders and their fingerprints, labels, data hashes.

        Raises:
            CheckpointError: a newer version of mopefuse wrote the run, or its manifest is damaged.
        """
        return check_facts(check_manifest(read_json(self.manifest_file), KIND, str(self.path)), self.manifest_file)

    def _model_facts(self) -> dict[str, Any]:
        facts = self.manifest()
        return {key: facts[key] for key in _MODEL_FACTS}

    def result(self) -> dict[str, Any]:
        """The contents of metrics.json; empty for a run that is not finished."""
        return read_json(self.metrics_file) if self.metrics_file.exists() else {}

    # -- log

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl.

        Raises:
            ResourceError: the disk is full, or the folder was removed or taken over by another process.
        """
        self._require_owned()
        try:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(line), ensure_ascii=False) + "\n")
        except OSError as error:
            raise disk_error(error, self.log_file) from error

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without a last line that is incomplete.

        Raises:
            CheckpointError: the file exists and cannot be read.
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
        """Remove lines after `step`, which a resumed run will log again; also the validation at `step` unless `validated`."""
        if not self.log_file.exists():
            return
        until = [line for line in self.read_log() if line["step"] <= step]
        kept = [line for line in until if validated or line["step"] < step or "val" not in line]
        write_atomically(self.log_file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    # -- initial weights

    def save_initial_weights(self, write: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
        """Save initial weights, kept until the first checkpoint is published; the run's manifest repeats their ``start``."""
        publish(self._start, write, {"kind": START, **facts})

    def initial_weights(self) -> tuple[Path, dict[str, Any]] | None:
        """The verified folder of initial weights and its facts; None if the run has a checkpoint or starts from scratch.

        Raises:
            CheckpointError: the folder is damaged, missing, or belongs to another run.
        """
        expected = read_json(self.manifest_file).get("start")
        if self.steps() or not expected:
            return None
        try:
            facts = verify(self._start, kind=START)
            if facts.get("start") != expected:
                raise CheckpointError(
                    CheckpointCode.START_CHANGED, "the initial weights belong to a different run", where=str(self._start)
                )
        except CheckpointError as error:
            error.fix = "run mopefuse swap-encoder again"
            raise
        return self._start, facts

    def drop_initial_weights(self) -> None:
        """Remove the initial weights."""
        shutil.rmtree(self._start, ignore_errors=True)

    # -- checkpoints

    def save(self, step: int, write: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
        """Publish checkpoint step-N, and remove all others but the best.

        Raises:
            ResourceError: the disk is full, or the folder was removed or taken over by another process.
        """
        self._require_owned()
        publish(self.checkpoints / f"step-{step}", write, {"kind": CHECKPOINT, "step": step, **self._model_facts(), **facts})
        self.drop_initial_weights()
        keep = {step, self.best_step()}
        for old in self.steps():
            if old not in keep:
                shutil.rmtree(self.checkpoints / f"step-{old}")

    def set_best(self, step: int) -> None:
        """Record which checkpoint is the best."""
        write_atomically(self._best, f"step-{step}\n")

    def best_step(self) -> int | None:
        """Step of the best checkpoint so far.

        Raises:
            CheckpointError: the file ``checkpoints/best`` is damaged.
        """
        if not self._best.exists():
            return None
        step = read_text(self._best).strip().removeprefix("step-")
        if not (step.isascii() and step.isdecimal()):
            raise CheckpointError(
                CheckpointCode.CONTENT_DAMAGED,
                "checkpoints/best is damaged",
                where=str(self._best),
                fix="use the checkpoint last or step-N",
            )
        return int(step)

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The undamaged checkpoint with the highest step, and its manifest; None if there are no checkpoints.

        Raises:
            CheckpointError: a newer version of mopefuse wrote the newest, or all are damaged.
        """
        damaged = None
        for step in reversed(self.steps()):
            folder = self.checkpoints / f"step-{step}"
            try:
                return folder, verify(folder, kind=CHECKPOINT)
            except CheckpointError as error:
                if error.number == CheckpointCode.NEWER_FORMAT:
                    raise
                damaged = damaged or error
        if damaged is not None:
            damaged.fix = "start a new run: there is no undamaged checkpoint"
            raise damaged
        return None

    def checkpoint(self, which: str = "best") -> tuple[Path, dict[str, Any]]:
        """The checkpoint ``best``, ``last`` or ``step-N``, verified, with its manifest.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, or it does not match the run's manifest.
        """
        steps = self.steps()
        if which == "last" and steps:
            which = f"step-{steps[-1]}"
        if which == "best" and self.best_step() is not None:
            which = f"step-{self.best_step()}"
        folder = self.checkpoints / which
        if which not in {f"step-{step}" for step in steps}:
            known = ", ".join(f"step-{step}" for step in steps)
            fix = f"use one of {known}" if known else "train the run until its first checkpoint"
            raise CheckpointError(
                CheckpointCode.NOT_FOUND, f"checkpoint not found: {which}", where=str(self.checkpoints), fix=fix
            )
        try:
            manifest = verify(folder, kind=CHECKPOINT)
        except CheckpointError as error:
            others = [f"step-{step}" for step in steps if f"step-{step}" != which]
            if others and error.number != CheckpointCode.NEWER_FORMAT:
                error.fix = f"use --checkpoint {others[-1]}"
            raise
        manifest = with_task(manifest)
        differ = [key for key, value in self._model_facts().items() if manifest.get(key) != value]
        if differ:
            what = f"the {differ[0]} of the run differ from those of its checkpoint"
            raise CheckpointError(
                CheckpointCode.CONTENT_DAMAGED, what, where=str(self.path), fix="restore the run's manifest.json"
            )
        return folder, manifest

    def steps(self) -> list[int]:
        """Steps of the published checkpoints in ascending order, damaged ones included."""
        found = self.checkpoints.glob("step-*")
        return sorted(int(path.name[5:]) for path in found if path.is_dir() and re.fullmatch(r"step-(0|[1-9]\d*)", path.name))


def default_path() -> Path:
    """The default run folder, ``runs/<date>-<time>``."""
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}"
