"""The folder of a fit: its state, and the candidates' predictions and runs.

``fit.json`` (settings, budget, what was tried), ``candidates/<name>/`` (the run of a candidate that was trained),
``candidates/<name>.safetensors`` (its predictions for samples that it was not trained on). At the end, the folder itself
becomes the run of the chosen candidate.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mopefuse import __version__
from mopefuse.autofit.scores import Predictions
from mopefuse.config.setting_paths import flatten
from mopefuse.core.artifact import FORMAT, check_manifest, dump_json, read_json
from mopefuse.core.atomic_files import disk_error, replace_atomically, write_atomically
from mopefuse.core.error_codes import CheckpointCode, ConfigCode
from mopefuse.core.tensor_files import read_tensors, write_tensors
from mopefuse.errors import CheckpointError, ConfigError
from mopefuse.runs.folder import RunFolder

KIND, STATE_FILE = "fit", "fit.json"
CROSS_VALIDATED, VALIDATED, SKIPPED, FAILED = "cross-validated", "validated", "skipped", "failed"


@dataclass
class Entry:
    """What became of a candidate.

    Args:
        reads: the modalities that it reads. note: why it was skipped, stopped or failed.
        strengths: C of each regression, chosen by cross-validation. epochs: epochs of an MLP that there was time for.
        trainable: number of trainable parameters; None if the model was not built.
    """

    name: str
    title: str
    reads: list[str]
    state: str
    note: str = ""
    seconds: float = 0.0
    trainable: int | None = None
    strengths: list[float] = field(default_factory=list)
    epochs: int | None = None

    @property
    def is_scored(self) -> bool:
        """Whether there are predictions of it."""
        return self.state in (CROSS_VALIDATED, VALIDATED)


class FitFolder:
    """The folder of a fit, whose state is written after each change.

    Args:
        settings: settings of the fit, nested; those of a resumed one must be equal.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.run = path, RunFolder(path)
        self.candidates = path / "candidates"
        self._state_file = path / STATE_FILE
        self.settings: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        self.spent = 0.0

    @contextmanager
    def claimed(self, *, resume: bool, overwrite: bool) -> Iterator[str]:
        """The folder, created, emptied or read, and locked while the context lasts; yields a notice, or an empty string.

        Raises:
            ConfigError: it is not empty, not a fit, or locked by another process.
        """
        if resume and overwrite:
            what = "--resume and --overwrite contradict each other"
            raise ConfigError(ConfigCode.RESUME_AND_OVERWRITE, what, fix="remove one of them")
        is_fit = self._state_file.is_file()
        occupied = self.path.is_dir() and any(not item.name.startswith(".") for item in self.path.iterdir())
        if occupied and not is_fit:
            what = f"{self.path} is neither empty nor a folder that mopefuse fit wrote"
            raise ConfigError(ConfigCode.BAD_FIT_FOLDER, what, where="--out", fix="choose a different folder with --out")
        if occupied and not (resume or overwrite):
            fix = "add --resume or --overwrite, or choose a different --out"
            raise ConfigError(ConfigCode.RUN_FOLDER_NOT_EMPTY, f"{self.path} is not empty", where="--out", fix=fix)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            notice = self.run.lock()
        except OSError as error:
            what = f"{self.path} cannot be written: {error.strerror}"
            raise ConfigError(
                ConfigCode.BAD_FIT_FOLDER, what, where="--out", fix="choose a different folder with --out"
            ) from None
        try:
            if overwrite:
                self._empty()
            elif is_fit:
                self._read()
            yield notice
        finally:
            self.run.unlock()

    def _empty(self) -> None:
        for item in [item for item in self.path.iterdir() if item.name != ".lock"]:
            shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()

    def _read(self) -> None:
        facts = check_manifest(read_json(self._state_file), KIND, str(self.path))
        try:
            self.settings, self.spent = dict(facts["settings"]), float(facts["spent"])
            self.entries = {entry["name"]: Entry(**entry) for entry in facts["candidates"]}
        except (KeyError, TypeError, ValueError):
            what, fix = f"{STATE_FILE} is damaged", "start over with --overwrite"
            raise CheckpointError(CheckpointCode.CONTENT_DAMAGED, what, where=str(self.path), fix=fix) from None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Record the settings of a new fit, or compare those of a resumed one.

        Raises:
            ConfigError: they differ.
        """
        before, now = flatten(self.settings), flatten(dict(settings))
        differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if self.settings and differing:
            what = f"a resumed fit cannot change {', '.join(differing)}"
            fix = "resume without this change, or start over with --overwrite"
            raise ConfigError(ConfigCode.FIT_HAS_OTHER_SETTINGS, what, where="--resume", fix=fix)
        self.settings = dict(settings)
        self.candidates.mkdir(exist_ok=True)

    def save(self, spent: float) -> None:
        """Write the state."""
        facts = {"kind": KIND, "format": FORMAT, "mopefuse": __version__, "settings": self.settings, "spent": spent}
        entries = [asdict(entry) for entry in self.entries.values()]
        write_atomically(self._state_file, dump_json({**facts, "candidates": entries}))

    def record(self, entry: Entry, spent: float, found: Predictions | None = None) -> None:
        """Record what became of a candidate, with its predictions."""
        if found is not None:
            self.save_predictions(entry.name, found)
        self.entries[entry.name] = entry
        self.save(spent)

    def save_predictions(self, name: str, found: Predictions) -> None:
        """Write the predictions of a candidate."""
        with replace_atomically(self._predictions(name)) as temporary:
            write_tensors(temporary, found._asdict())

    def predictions(self, name: str) -> Predictions:
        """The predictions of a candidate."""
        return Predictions(**read_tensors(self._predictions(name)))

    def _predictions(self, name: str) -> Path:
        return self.candidates / f"{name}.safetensors"

    def candidate_run(self, name: str) -> RunFolder:
        """The run of a candidate."""
        return RunFolder(self.candidates / name)

    def publish(self, source: RunFolder, weights: Mapping[str, Any], step: int, facts: Mapping[str, Any]) -> None:
        """Make the folder a run: that of a candidate, with one checkpoint.

        Args:
            weights: its trainable state. step: its step. facts: entries of its manifest.
        """
        try:
            shutil.rmtree(self.run.checkpoints, ignore_errors=True)
            self.run.checkpoints.mkdir()
            for name in ("metrics.jsonl", "splits.json"):
                if (source.path / name).is_file():
                    write_atomically(self.path / name, (source.path / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise disk_error(error, self.path) from error
        self.run.start(source.config(), {k: v for k, v in source.manifest().items() if k not in ("kind", "format")})
        optimizer = source.checkpoints / f"step-{step}" / "optimizer.safetensors"

        def write(folder: Path) -> None:
            write_tensors(folder / "weights.safetensors", weights)
            shutil.copyfile(optimizer, folder / optimizer.name)

        self.run.save(step, write, facts)
        self.run.set_best(step)


def require_one_process() -> None:
    """Refuse to run under torchrun with several processes.

    Raises:
        ConfigError: there are several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        what = "mopefuse fit runs in one process"
        raise ConfigError(ConfigCode.FIT_IN_SEVERAL_PROCESSES, what, where="WORLD_SIZE", fix="start it without torchrun")
